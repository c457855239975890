"""A selector around another's."""

from __future__ import annotations

from torch import Tensor

from sessiond.policies.base import LayerView, Scan, Selector, Taken


class WrappingSelector(Selector):
    """Passes everything on to `inner`, and changes its answers.

    `dense`: prompts attend to all of history, whatever is answered.
    """

    def __init__(self, inner: Selector, *, dense: bool) -> None:
        self._inner = inner
        self._dense = dense

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    @property
    def scan(self) -> Scan | None:
        return self._inner.scan

    def keep(self, n: int) -> None:
        self._inner.keep(n)

    def renew(self, n: int) -> None:
        self._inner.renew(n)

    def prompt(self, view: LayerView) -> Tensor | Taken | None:
        answer = self._inner.prompt(view)
        return None if self._dense else self._changed(answer, view)

    def step(self, view: LayerView) -> Tensor | Taken | None:
        return self._changed(self._inner.step(view), view)

    def rest(self, view: LayerView) -> None:
        self._inner.rest(view)

    def _changed(self, answer: Tensor | Taken | None, view: LayerView) -> Tensor | Taken | None:
        raise NotImplementedError
