"""Forwards under way, seen from outside: how often each rested between two layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sessiond.forward import ForwardStep
from sessiond.model import Feed, Model


class RestingStep(ForwardStep):
    """`rests` counts how often the step rested."""

    def __init__(self, step: ForwardStep) -> None:
        self._step = step
        self.rests = 0

    def advance(self, enough: Callable[[], bool] | None = None) -> Tensor | None:
        logits = self._step.advance(enough)
        self.rests += logits is None
        return logits


class RestingSteps:
    """In the place of `model.begin`. `begun`: the forwards of pieces and cells; decode steps never rest."""

    def __init__(self, model: Model) -> None:
        self._begin = model.begin
        self.begun: list[RestingStep] = []

    def __call__(self, feeds: Sequence[Feed], logit_rows: Sequence[int]) -> RestingStep:
        step = RestingStep(self._begin(feeds, logit_rows))
        if not any(feed.decoding for feed in feeds):
            self.begun.append(step)
        return step

    @property
    def rests(self) -> int:
        return sum(step.rests for step in self.begun)
