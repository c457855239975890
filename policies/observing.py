"""The newest queries of a layer: what a policy asks to learn which earlier tokens matter now."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Observed:
    """At most `limit` newest queries of one layer, each with its position.

    G key/value heads, H query heads, W queries, D channels.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queries: deque[tuple[int, Tensor]] = deque(maxlen=limit)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(query.nbytes for _, query in self._queries)

    def watch(self, query: Tensor, start: int) -> None:
        """See the queries [H, Q, D] of the tokens at [start, start + Q)."""
        self.keep(start)
        newest = query[:, -self._limit :].clone()  # a copy: the rest of a long prompt need not stay
        first = start + query.shape[1] - newest.shape[1]
        self._queries.extend((first + i, newest[:, i]) for i in range(newest.shape[1]))

    def keep(self, n: int) -> None:
        """Forget the queries at positions from `n` on."""
        while self._queries and self._queries[-1][0] >= n:
            self._queries.pop()

    def newest(self, since: int, carry: int) -> tuple[Tensor, Tensor]:
        """Queries [H, W, D] and their positions [W]: those from `since` on, and at most `carry` of those before."""
        n_before = sum(position < since for position, _ in self._queries)
        taken = list(self._queries)[max(0, n_before - carry) :]
        return torch.stack([query for _, query in taken], 1), torch.tensor([position for position, _ in taken])
