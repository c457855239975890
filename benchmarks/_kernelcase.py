"""A kernel on one shape, beside its reference, with what it must read and compute: `make bench-kernels` measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

COLD_BYTES = 1 << 27  # of data that takes turns, so that none of it is found in a cache


def n_cold(nbytes: int) -> int:
    """How many sets of so many bytes take turns."""
    return max(2, -(-COLD_BYTES // nbytes))


@dataclass(frozen=True, slots=True)
class KernelCase:
    """`figure`: the name under which its share of the floor is printed, if an issue asks for it.

    `nbytes`: what a call must at least read and write, once; `multiply_adds` of type `kind` (bf16, int8, fp32).
    `fresh`: called before every run, out of the measured time, so that data comes from memory and not from caches.
    """

    name: str
    run: Callable[[], object]
    reference: Callable[[], object] | None
    nbytes: int
    multiply_adds: int = 0
    kind: str = "bf16"
    figure: str = ""
    fresh: Callable[[], object] | None = None
