"""Arithmetic that several policies share: true attention weights, and the best k positions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sessiond.policies.base import LayerView

AT_ONCE = 32  # queries whose weights are held at a time


def attention_weights(view: LayerView, last: int) -> Tensor:
    """Softmax weights of the `last` newest queries over all T keys, causal, fp32: [G, H // G, last, T]."""
    query = view.grouped[:, :, -last:].float()
    n_keys = view.keys.shape[1]
    scores = query @ view.keys.float()[:, None].transpose(-1, -2) * view.scaling
    positions = torch.arange(n_keys - last, n_keys)[:, None]
    return scores.masked_fill(torch.arange(n_keys) > positions, float("-inf")).softmax(-1)


def summed_weights(view: LayerView, n: int) -> Tensor:
    """Softmax weights that positions below `n` get, summed over the view's queries and a group's heads: [G, n].

    A few queries at a time: all their weights at once may be gigabytes.
    """
    start, end = view.keys.shape[1] - view.query.shape[1], view.keys.shape[1]
    total = torch.zeros(view.keys.shape[0], n)
    for first in range(start, end, AT_ONCE):
        last = min(first + AT_ONCE, end)
        part = replace(view, query=view.query[:, first - start : last - start], keys=view.keys[:, :last])
        seen = min(n, last)
        total[:, :seen] += attention_weights(part, last - first)[..., :seen].sum((1, 2))
    return total


def top(scores: Tensor, k: int) -> Tensor:
    """Positions of the `k` highest scores [G, T] of each row, ascending; all, if there are no more. Ties: the earlier.

    The same scores give the same choice on every run. NaN comes last.
    """
    n_groups, n = scores.shape
    if k >= n:
        return torch.arange(n).expand(n_groups, -1)
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    # A stable sort says the same in several times the time. Of topk only the values are sure, not its order of ties.
    least = scores.topk(max(k, 1), -1).values.amin(-1, keepdim=True)
    above, tied = scores > least, scores == least
    room = k - above.sum(-1, keepdim=True)
    return (above | tied & (tied.cumsum(-1) <= room)).nonzero()[:, 1].view(n_groups, k)


def ascending(positions: Tensor) -> Tensor:
    """Each row of `positions` [G, K] sorted, with its -1 at the end."""
    after_all = torch.iinfo(positions.dtype).max
    ordered = positions.masked_fill(positions < 0, after_all).sort(-1).values
    return ordered.masked_fill(ordered == after_all, -1)
