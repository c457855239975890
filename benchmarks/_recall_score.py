"""Paired scores of asks: only those that full attention gets right count, so that every loss is a policy's.

`full` and `method` are [C, T] bool: in which turns of which conversations the ask was answered right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def retention(full: Tensor, method: Tensor) -> Tensor:
    """[T]: of the asks in a turn that full attention gets right, the share that the method does, too.

    Raises ValueError for a turn in which full attention gets none.
    """
    return _retention(full, method, torch.ones(1, len(full)))[0]


def slope(full: Tensor, method: Tensor) -> float:
    """Of retention over turns by least squares, in percentage points per turn."""
    return float(_slopes(retention(full, method)[None])[0])


def slope_interval(full: Tensor, method: Tensor, n_draws: int = 4000, seed: int = 0) -> tuple[float, float]:
    """95% of bootstrapped slopes: conversations are drawn anew, each with all of its asks."""
    n = len(full)
    drawn = torch.randint(n, (n_draws, n), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(n_draws, n).scatter_add_(1, drawn, torch.ones(n_draws, n))
    low, high = torch.quantile(_slopes(_retention(full, method, weights)), torch.tensor([0.025, 0.975]).double())
    return float(low), float(high)


def first_asks(full: Tensor, seed: int = 0) -> Tensor:
    """[C] int64: of each conversation one later turn that full attention gets right, -1 if there is none.

    The order in which turns are tried is drawn from the seed alone.
    """
    order = torch.rand(full.shape[0], full.shape[1] - 1, generator=torch.Generator().manual_seed(seed)).argsort(1) + 1
    right = full.gather(1, order)
    chosen = order.gather(1, right.int().argmax(1, keepdim=True))[:, 0]
    return chosen.masked_fill(~right.any(1), -1)


def flips(full: Tensor, method: Tensor) -> tuple[int, int]:
    """Asks that only full attention got right, and those that only the method did."""
    return int((full & ~method).sum()), int((~full & method).sum())


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of so uneven flips if either way were as likely."""
    n, few = lost + won, min(lost, won)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)


def loss_bound(lost: int, n: int) -> float | None:
    """Upper 95% bound of the share lost where none of `n` was: the rule of three. None if some were."""
    return None if lost or not n else min(1.0, 3 / n)


def _retention(full: Tensor, method: Tensor, weights: Tensor) -> Tensor:
    """[N, T] for weights [N, C] of the conversations, fp64."""
    asked = weights.double() @ full.double()
    if bool((asked == 0).any()):
        raise ValueError("in some turn full attention gets no ask right")
    return (weights.double() @ (full & method).double()) / asked


def _slopes(by_turn: Tensor) -> Tensor:
    """[N] of [N, T], in percentage points per turn."""
    turns = torch.arange(by_turn.shape[1]).double()
    centred = turns - turns.mean()
    return 100 * (by_turn @ centred) / (centred @ centred)
