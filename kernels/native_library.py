"""The compiled kernels, if this installation has them and this processor runs them."""

from __future__ import annotations

from typing import Any

try:
    from sessiond.kernels._native import ffi as _ffi
    from sessiond.kernels._native import lib as _lib
except ImportError:  # installed without a C compiler: every kernel falls back to its reference
    _ffi = _lib = None

ffi: Any = _ffi
lib: Any = _lib
BUILT: bool = lib is not None
# Instructions that the kernels find here: 0 portable, 1 AVX2, 2 AVX-512 with BF16 and VNNI; -1: nothing is compiled.
ISA: int = lib.isa_here() if BUILT else -1
LEVELS = ("portable", "avx2", "avx512")
# Names the sources that the kernels were compiled from: others may compute other bits.
SOURCES: str = ffi.string(lib.sources_digest()).decode() if BUILT else "none"
