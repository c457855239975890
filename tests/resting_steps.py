"""Forwards that really rest between two layers, whatever the model's own `begin` does: each runs on a thread that is
let go on from one rest to the next."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sessiond.model import Feed, Model


class RestingStep:
    """As StepUnderWay. `rests` counts how often it rested; `drop` ends a step that nobody goes on with."""

    def __init__(self, model: Model, feeds: Sequence[Feed], logit_rows: Sequence[int]) -> None:
        self.rests = 0
        self._work = model, feeds, logit_rows
        self._go: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._enough: Callable[[], bool] = lambda: False
        self._layers = 0
        self._n_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self, enough: Callable[[], bool]) -> Tensor | None:
        self._enough = enough
        self._go.put(True)
        said = self._said.get()
        if isinstance(said, Exception):
            raise said
        self.rests += said is None
        return said

    def drop(self) -> None:
        self._go.put(False)
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._n_threads)
        if not self._go.get():
            return
        try:
            model, feeds, logit_rows = self._work
            self._said.put(model.step(feeds, logit_rows, self._asked))
        except Exception as error:  # noqa: BLE001 - carried to who waits for it
            self._said.put(error)

    def _asked(self) -> bool:
        """Called before every layer; whether the step is to be abandoned."""
        self._layers += 1
        if self._layers > 1 and self._enough():
            self._said.put(None)
            return not self._go.get()
        return False


class RestingSteps:
    """In the place of `model.begin`; `over` must be called in the end."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.begun: list[RestingStep] = []

    def __call__(self, feeds: Sequence[Feed], logit_rows: Sequence[int]) -> RestingStep:
        self.begun.append(RestingStep(self._model, feeds, logit_rows))
        return self.begun[-1]

    @property
    def rests(self) -> int:
        return sum(step.rests for step in self.begun)

    def over(self) -> None:
        for step in self.begun:
            step.drop()
