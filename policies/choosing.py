"""Arithmetic that several policies share: attention weights by the exact keys, and the best k positions."""

from __future__ import annotations

import torch
from torch import Tensor

from sessiond.kernels.top import top

__all__ = ["ascending", "summed_weights", "top"]

AT_ONCE = 32  # queries whose weights are held at a time

_numbers = torch.arange(0)


def first(n: int, n_groups: int) -> Tensor:
    """Positions [0, n) for every head: [G, n], a view that nobody may write to."""
    global _numbers
    if n > len(_numbers):
        _numbers = torch.arange(2 * n)
    return _numbers[:n].expand(n_groups, -1)


def summed_weights(query: Tensor, at: Tensor, keys: Tensor, places: Tensor, scaling: float) -> Tensor:
    """Softmax weights that keys [G, K, D] at `places` ([K] or [G, K]) get from queries [H, W, D] at `at` [W]: [G, K].

    Causal, fp32; summed over the queries and a group's heads. A few queries at a time: the weights of all at once may
    be gigabytes.
    """
    n_groups, n_keys, head_dim = keys.shape
    keys, places = keys.float()[:, None], places.expand(n_groups, -1)[:, None, None]
    total = torch.zeros(n_groups, n_keys)
    for some, now in zip(torch.split(query, AT_ONCE, 1), torch.split(at, AT_ONCE), strict=True):
        grouped = some.float().reshape(n_groups, -1, some.shape[1], head_dim)
        scores = (grouped @ keys.mT * scaling).masked_fill_(places > now[:, None], float("-inf"))
        total += scores.softmax(-1).sum((1, 2))
    return total


def ascending(positions: Tensor) -> Tensor:
    """Each row of `positions` [G, K] sorted, with its -1 at the end."""
    after_all = torch.iinfo(positions.dtype).max
    ordered = positions.masked_fill(positions < 0, after_all).sort(-1).values
    return ordered.masked_fill(ordered == after_all, -1)
