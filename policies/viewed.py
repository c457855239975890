"""Another selector's choice, read in few bits."""

from __future__ import annotations

from torch import Tensor

from sessiond.policies.base import LayerView, Selector, Taken
from sessiond.policies.quantized import QuantizedKV
from sessiond.policies.wrapping import WrappingSelector

GROUP = 32  # channels that share a scale, as in `int4`


class ViewedSelector(WrappingSelector):
    """The copy covers what came before the turn, also what is never chosen: the next turn may."""

    def __init__(self, inner: Selector, bits: int, *, dense: bool) -> None:
        super().__init__(inner, dense=dense)
        self._copy = QuantizedKV(bits, GROUP)

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes + self._copy.nbytes

    def keep(self, n: int) -> None:
        self._inner.keep(n)
        self._copy.keep(n)

    def renew(self, n: int) -> None:
        self._inner.renew(n)
        self._copy.keep(n)

    def prompt(self, view: LayerView) -> Tensor | Taken | None:
        self._extend(view)
        return super().prompt(view)

    def rest(self, view: LayerView) -> None:
        super().rest(view)
        self._extend(view)

    def _changed(self, answer: Tensor | Taken | None, view: LayerView) -> Taken | None:
        """A form that the inner selector gives its answer gives way to this one."""
        self._extend(view)
        if view.turn_start == 0:
            return None
        if answer is None:
            return self._copy.all(view.turn_start)
        positions = answer.positions if isinstance(answer, Taken) else answer
        return self._copy.at(positions, view.turn_start)

    def _extend(self, view: LayerView) -> None:
        self._copy.extend(view.keys[:, : view.turn_start], view.values[:, : view.turn_start])
