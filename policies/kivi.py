"""KIVI (Liu et al. 2024, arXiv 2402.02750): all of history in 2 bits, keys by channel and values by token.

Outliers of keys sit in the same channels of all tokens: a channel's numbers over a group of tokens share a scale, so
that they spoil no others. Values have none. The newest tokens stay exact, as keys wait for their group to fill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sessiond.policies.base import LayerView, ModelFacts, Policy, Selector, Taken
from sessiond.policies.knobs import one_of, whole
from sessiond.policies.quantized import Codes, kv_bytes


@dataclass(frozen=True, slots=True)
class Kivi(Policy):
    """Read earlier tokens in `bits` bits, but for at least `residual` newest of them, which are read exactly.

    `group`: tokens that share a key channel's scale, and channels that share that of a value.
    """

    name: ClassVar[str] = "kivi"
    offloads: ClassVar[bool] = True
    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        one_of(self.name, "bits", self.bits, (2, 4))
        whole(self.name, "group", self.group, 2, 1 << 10)
        whole(self.name, "residual", self.residual, 0, 1 << 20)

    def index_bytes(self, model: ModelFacts) -> int:
        return kv_bytes(model, self.bits, self.group)

    def selector(self, layer: int, n_layers: int) -> Selector:
        return KiviSelector(self)


# [0, coded)            in few bits: whole groups
# [coded, turn_start)   at least `residual` tokens, exact
# [turn_start, T)       the turn's own
class KiviSelector(Selector):
    def __init__(self, policy: Kivi) -> None:
        self._policy = policy
        self._head_dim = 0
        self._keys = Codes(policy.bits)  # a row: one channel of a group of tokens; D rows for each group
        self._values = Codes(policy.bits, policy.group)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def keep(self, n: int) -> None:
        self._keys.keep(n // self._policy.group * self._head_dim)
        self._values.keep(n)

    def prompt(self, view: LayerView) -> None:
        self._extend(view)

    def step(self, view: LayerView) -> Taken | None:
        """None while all of history is newest."""
        n = self._extend(view)
        if n == 0:
            return None
        rest, dtype = slice(n, view.turn_start), view.keys.dtype
        keys = torch.cat([self._read_keys(n, dtype), view.keys[:, rest]], 1)
        values = torch.cat([self._values.read(n, dtype), view.values[:, rest]], 1)
        positions = torch.arange(view.turn_start).expand(len(keys), -1)
        nbytes = self._keys.used(self._rows(n)) + self._values.used(n)
        return Taken(positions, keys, values, f"kivi{self._policy.bits}", nbytes, view.turn_start - n)

    def rest(self, view: LayerView) -> None:
        self._extend(view)

    def _extend(self, view: LayerView) -> int:
        """Quantize what is not yet, of the tokens that this turn reads in few bits: so many."""
        size = self._policy.group
        n = max(0, view.turn_start - self._policy.residual) // size * size
        self._head_dim = view.keys.shape[2]
        if self._rows(n) > self._keys.n:
            self._keys.extend(self._by_channel(view.keys[:, :n]))
        self._values.extend(view.values[:, :n])
        return n

    def _rows(self, n: int) -> int:
        return n // self._policy.group * self._head_dim

    def _by_channel(self, keys: Tensor) -> Tensor:
        """[G, n, D], n of whole groups, to a row for each group of tokens and channel: [G, n / group * D, group]."""
        n_groups, _, head_dim = keys.shape
        size = self._policy.group
        return keys.reshape(n_groups, -1, size, head_dim).transpose(2, 3).reshape(n_groups, -1, size)

    def _read_keys(self, n: int, dtype: torch.dtype) -> Tensor:
        """The first `n` keys [G, n, D]."""
        rows = self._keys.read(self._rows(n), dtype)
        n_groups, _, size = rows.shape
        return rows.view(n_groups, -1, self._head_dim, size).transpose(2, 3).reshape(n_groups, n, self._head_dim)
