"""The compiled kernels, if this installation has them and this processor runs them."""

from __future__ import annotations

from typing import Any

try:
    from sessiond.kernels._native import lib as _lib
except ImportError:  # installed without a C compiler: every kernel falls back to its reference
    _lib = None

lib: Any = _lib
BUILT: bool = lib is not None
AVX512_BF16: bool = BUILT and bool(lib.has_avx512_bf16())
