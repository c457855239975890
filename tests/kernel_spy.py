"""Counts the calls of the compiled kernels: a model that is to go through them must be seen to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import sessiond.kernels.attention
import sessiond.kernels.linear
from sessiond.kernels.native_library import lib

LINEAR, ATTENTION = "linear_bf16", "attention_spans"


class KernelSpy:
    """Stands before the library while `monkeypatch` lasts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        for module in (sessiond.kernels.linear, sessiond.kernels.attention):
            monkeypatch.setattr(module, "lib", self)

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(lib, name)

    def take(self) -> tuple[int, int]:
        """Products and attentions computed since the last look."""
        found = self.calls[LINEAR], self.calls[ATTENTION]
        self.calls.clear()
        return found
