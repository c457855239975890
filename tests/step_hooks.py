"""Stands before every forward of a model, begun by `step` or by `begin`, of which one may be made of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sessiond.model import Feed

Before = Callable[[Sequence[Feed]], None]


class StepHook:
    """`before` is called with a forward's feeds, `after` with its logits: once each, on the thread that computes it."""

    def __init__(self, model: Any, before: Before, after: Callable[[Any], None] | None = None) -> None:
        self._model, self._before, self._after = model, before, after
        self._step, self._begin = model.step, model.begin
        self._inside = False
        model.step, model.begin = self.step, self.begin

    def remove(self) -> None:
        self._model.step, self._model.begin = self._step, self._begin

    def step(self, feeds: Sequence[Feed], *rest: Any) -> Any:
        return self.run(feeds, lambda: self._step(feeds, *rest))

    def begin(self, feeds: Sequence[Feed], logit_rows: Sequence[int]) -> HookedStep:
        return HookedStep(self, self._begin(feeds, logit_rows), feeds)

    def run(self, feeds: Sequence[Feed], compute: Callable[[], Any]) -> Any:
        """Compute a forward or a part of it. `feeds`: its own, if it is the first part."""
        if self._inside:
            return compute()
        if feeds:
            self._before(feeds)
        self._inside = True
        try:
            logits = compute()
        finally:
            self._inside = False
        if self._after is not None and logits is not None:
            self._after(logits)
        return logits


class HookedStep:
    """As ForwardStep."""

    def __init__(self, hook: StepHook, step: Any, feeds: Sequence[Feed]) -> None:
        self._hook, self._step, self._feeds = hook, step, feeds

    def advance(self, enough: Callable[[], bool] | None = None) -> Any:
        feeds, self._feeds = self._feeds, ()
        return self._hook.run(feeds, lambda: self._step.advance(enough))
