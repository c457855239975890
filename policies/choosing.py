"""Arithmetic that several policies share: true attention weights, and the best k positions."""

from __future__ import annotations

import torch
from torch import Tensor

from sessiond.policies.base import LayerView


def attention_weights(view: LayerView, last: int) -> Tensor:
    """Softmax weights of the `last` newest queries over all T keys, causal, fp32: [G, H // G, last, T]."""
    query = view.grouped[:, :, -last:].float()
    n_keys = view.keys.shape[1]
    scores = query @ view.keys.float()[:, None].transpose(-1, -2) * view.scaling
    positions = torch.arange(n_keys - last, n_keys)[:, None]
    return scores.masked_fill(torch.arange(n_keys) > positions, float("-inf")).softmax(-1)


def top(scores: Tensor, k: int) -> Tensor:
    """Positions of the `k` highest scores [G, T] of each row, ascending; all, if there are no more. Ties: the earlier.

    A stable sort: the same scores give the same choice on every run.
    """
    if k >= scores.shape[-1]:
        return torch.arange(scores.shape[-1]).expand(scores.shape[0], -1)
    best = scores.sort(stable=True, dim=-1, descending=True).indices[:, :k]
    return best.sort(-1).values
