"""Counts the layers that compiled kernels compute: a model that is to go through them must be seen to."""

from __future__ import annotations

from typing import Any

import pytest

import sessiond.kernels.decoder
from sessiond.kernels.native_library import lib


class KernelSpy:
    """Stands before the library while `monkeypatch` lasts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers = 0
        monkeypatch.setattr(sessiond.kernels.decoder, "lib", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def decoder_before(self, *args: Any) -> None:
        self.layers += 1
        lib.decoder_before(*args)

    def decoder_run(self, decoder: Any, layers: Any, step: Any, first: int, last: int, *rest: Any) -> None:
        self.layers += last - first
        lib.decoder_run(decoder, layers, step, first, last, *rest)

    def take(self) -> int:
        """Layers computed since the last look."""
        found, self.layers = self.layers, 0
        return found
