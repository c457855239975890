"""Which tests need the compiled kernels. Where they cannot run, pytest's summary says why."""

from __future__ import annotations

import pytest

from sessiond.kernels.native_library import BUILT, ISA, lib

needs_build = pytest.mark.skipif(not BUILT, reason="the kernels were not compiled: no C compiler at install")


class Level:
    """`with level:` kernels use no better instructions than these; as often as wanted."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __enter__(self) -> None:
        lib.limit_isa(self._most)

    def __exit__(self, *raised: object) -> None:
        lib.limit_isa(BEST)


BEST = 2  # of native.h
LEVELS = ["portable", "avx2", "avx512"][: max(ISA, 0) + 1]
# A test with the argument `level` runs on every level of instructions that this processor has.
levels = pytest.mark.parametrize("level", [Level(most) for most in range(len(LEVELS))], ids=LEVELS)
