"""Memory that kernels compute in, kept by thread: fresh pages at every call would cost more than the arithmetic."""

from __future__ import annotations

import threading

import torch


class _Kept(threading.local):
    def __init__(self) -> None:
        self.words = torch.empty(0, dtype=torch.int64)
        self.address = 0


_kept = _Kept()


def scratch(n_words: int) -> int:
    """The address of `n_words` words of 32 bits, 8-byte aligned: this thread's until its next call."""
    if _kept.words.shape[0] * 2 < n_words:
        _kept.words = torch.empty(n_words // 2 + n_words // 8 + 1, dtype=torch.int64)
        _kept.address = _kept.words.data_ptr()
    return _kept.address
