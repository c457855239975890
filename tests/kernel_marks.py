"""Which tests need the compiled kernels. Where they cannot run, pytest's summary says why."""

from __future__ import annotations

import pytest

from sessiond.kernels.native_library import AVX512_BF16, BUILT

needs_build = pytest.mark.skipif(not BUILT, reason="the kernels were not compiled: no C compiler at install")
needs_avx512_bf16 = pytest.mark.skipif(
    not AVX512_BF16, reason="this processor has no AVX-512 BF16, or no kernels built"
)
