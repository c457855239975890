"""Another selector's choice among the tokens that the session's prior keeps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sessiond.kernels.coded import CodedRows
from sessiond.policies.base import LayerView, Selector, Taken
from sessiond.policies.prior import Prior
from sessiond.policies.wrapping import WrappingSelector


class PriorSelector(WrappingSelector):
    """Keeps the mask of a prior until another one comes."""

    def __init__(self, inner: Selector, layer: int, share: float, *, dense: bool) -> None:
        super().__init__(inner, dense=dense)
        self._layer = layer
        self._share = share
        self._prior: Prior | None = None
        self._mask = torch.empty(0, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes + self._mask.nbytes

    def _changed(self, answer: Tensor | Taken | None, view: LayerView) -> Tensor | Taken | None:
        if view.prior is None:
            return answer
        if view.prior is not self._prior:
            self._prior = view.prior
            self._mask = view.prior.kept(self._share, "pair-uniform")[self._layer]
        mask = self._mask[:, : view.turn_start]
        if answer is None:
            answer = torch.arange(view.turn_start).expand(len(mask), -1)
        return narrowed(answer, mask)


def narrowed(answer: Tensor | Taken, mask: Tensor) -> Tensor | Taken:
    """The positions of an answer where `mask` [G, N] holds, and all from N on, with the form they came in."""
    positions = answer.positions if isinstance(answer, Taken) else answer
    n_groups, n = mask.shape
    width = max(n, int(positions.max()) + 1) if positions.numel() else n
    allowed = torch.cat([mask, mask.new_ones(n_groups, width - n), mask.new_zeros(n_groups, 1)], 1)
    stays = allowed.gather(1, positions.where(positions >= 0, width))
    order = stays.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    order = order[:, : int(stays.sum(-1).max())] if positions.numel() else order
    left = positions.masked_fill(~stays, -1).gather(1, order)
    if not isinstance(answer, Taken):
        return left
    keys, values = (_reordered(form, order) for form in (answer.keys, answer.values))
    return replace(answer, positions=left, keys=keys, values=values, whole=False)


def _reordered(form: Tensor | CodedRows | None, order: Tensor) -> Tensor | CodedRows | None:
    """Coded rows go by position."""
    return form.gather(1, order[..., None].expand(-1, -1, form.shape[2])) if isinstance(form, Tensor) else form
