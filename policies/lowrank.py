"""Rows of numbers as few coordinates in a basis of their own, which grows with them (METHODS.md, ShadowKV).

The reference takes one SVD of a prompt, and leaves what comes later as it is. Here the basis Psi is of the top
eigenvectors of the rows' scatter, a sum: appended rows get coordinates in the basis there is, as long as it holds
them; then what they add to the sum gives a new one, and all coordinates are taken again from the exact rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sessiond.kernels.lowrank import Bases, Factors, bases_of, low_rank_keys
from sessiond.kernels.rope import Rope

AT_ONCE = 4096  # rows held in fp32 at a time
WHOLE = 32  # a basis is filled up with zeros to so many columns: kernels take no others

Rows = Callable[[int, int], Tensor]


class LowRank:
    """Rows at [0, n) of C columns, about their mean: coordinates A [n, R] and basis Psi [C, R], both in bf16.

    R is `rank`, or with 0 the least that holds the share `energy` of what the rows vary by. A basis is given up for an
    appended block that loses a share of `drift` more than the rows lost which the basis was made from.
    """

    # [0, factored)  the basis and the mean are of these rows
    # [factored, n)  appended in that basis
    # [0, summed)    in the sums: `factored` rows, or none where some were computed again
    def __init__(self, rank: int, energy: float, drift: float) -> None:
        self._rank, self._energy, self._drift = rank, energy, drift
        self._forget()

    def _forget(self) -> None:
        self.factored = self._summed = 0
        self._lost = 0.0  # share of the factored rows' scatter that the basis does not hold
        empty = torch.empty(0)
        self._origin, self._mean, self._basis, self._coordinates = empty, empty, empty, empty
        self._held_rank = 0
        self._bases: tuple[int, Bases | None] | None = None  # of so many groups
        self._sum, self._gram = empty, empty  # of rows less `origin`: the mean is most of a key

    @property
    def n(self) -> int:
        return self._coordinates.shape[0]

    @property
    def rank(self) -> int:
        return self._held_rank

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        sums = self._origin.nbytes + self._sum.nbytes + self._gram.nbytes
        return sums + self._mean.nbytes + self._basis.nbytes + self._coordinates.nbytes

    def keep(self, n: int) -> None:
        """Forget the rows from `n` on; all of them, if the basis was made with some of those."""
        if n < self.factored:
            self._forget()
        else:
            self._cut(n)

    def renew(self, n: int) -> None:
        """The rows from `n` on are computed again, for the same tokens: the basis stays while it holds them."""
        self._cut(n)
        if n < self._summed:
            self._summed = 0

    def cover(self, rows: Rows, n: int) -> None:
        """Hold the first `n` rows. `rows(a, b)` [b - a, C], fp32, are the exact ones at [a, b)."""
        if n > self.n and (self.factored == 0 or not self._append(rows, n)):
            self._factor(rows, n)

    def take(self, positions: Tensor) -> Tensor:
        """What the rows at `positions` [G, K] are about: [G, K, C / G], fp32; the columns are divided into G parts."""
        return self._factors.plain(positions)

    def keys(self, positions: Tensor, exact: Tensor, keys: Tensor, rope: Rope) -> Tensor:
        """`low_rank_keys`, of keys [G, T, D] whose rows before their rotation these are."""
        n_groups, factors = positions.shape[0], self._factors
        if self._bases is None or self._bases[0] != n_groups:
            self._bases = n_groups, bases_of(factors, n_groups)
        return low_rank_keys(factors, self._bases[1], positions, exact, keys, rope)

    @property
    def _factors(self) -> Factors:
        return Factors(self._coordinates, self._basis, self._mean)

    def _append(self, rows: Rows, n: int) -> bool:
        """Whether the basis holds the rows up to `n`. Those are held up to the first block which it does not."""
        for block in _blocks(rows, self.n, n):
            about = block - self._mean
            coordinates = self._project(about)
            lost = about - coordinates.float() @ self._basis.float().T
            if float(lost.square().sum()) > (self._lost + self._drift) * float(about.square().sum()):
                return False
            self._coordinates = torch.cat([self._coordinates, coordinates])
        return True

    def _factor(self, rows: Rows, n: int) -> None:
        """A basis of the first `n` rows, and their coordinates."""
        for block in _blocks(rows, self._summed, n):
            self._add(block)
        self.factored = n
        offset = self._sum / n
        self._mean = self._origin + offset
        variances, vectors = torch.linalg.eigh(self._gram - n * torch.outer(offset, offset))
        variances = variances.clamp(min=0).flip(-1)
        total = float(variances.sum())
        held = variances.cumsum(-1) / max(total, 1e-30)
        rank = min(self._rank or int((held < self._energy).sum()) + 1, len(held))
        if total > 0:
            self._lost = 1 - float(held[rank - 1])
        else:  # nothing varies yet, and nothing is lost: the first row that does gives another basis
            rank, self._lost = 1, 0.0
        basis = vectors.flip(-1)[:, :rank].to(torch.bfloat16)
        self._basis, self._held_rank, self._bases = F.pad(basis, (0, -rank % WHOLE)), rank, None
        self._coordinates = torch.cat([self._project(block - self._mean) for block in _blocks(rows, 0, n)])

    def _add(self, block: Tensor) -> None:
        if self._summed == 0:
            self._origin = block.mean(0)
            self._sum = torch.zeros_like(self._origin)
            self._gram = block.new_zeros(block.shape[1], block.shape[1])
        about = block - self._origin
        self._sum += about.sum(0)
        self._gram += about.T @ about
        self._summed += len(block)

    def _cut(self, n: int) -> None:
        if n < self.n:
            self._coordinates = self._coordinates[:n].clone()

    def _project(self, about: Tensor) -> Tensor:
        return (about @ self._basis.float()).to(torch.bfloat16)


def _blocks(rows: Rows, start: int, end: int) -> Iterator[Tensor]:
    return (rows(at, min(at + AT_ONCE, end)) for at in range(start, end, AT_ONCE))
