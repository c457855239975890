"""The compiled kernels, if this installation has them and this processor runs them."""

from __future__ import annotations

from typing import Any

try:
    from sessiond.kernels._native import ffi as _ffi
    from sessiond.kernels._native import lib as _lib
except ImportError:  # installed without a C compiler: every kernel falls back to its reference
    _ffi = _lib = None

lib: Any = _lib
ffi: Any = _ffi
BUILT: bool = lib is not None
# Instructions that the kernels find here: 0 portable, 1 AVX2, 2 AVX-512 with BF16 and VNNI; -1: nothing is compiled.
ISA: int = lib.isa_here() if BUILT else -1
AVX512_BF16: bool = ISA == 2
