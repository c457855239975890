"""Sieve, our own: a few-bit copy of every key points at the tokens that matter; those are read exactly.

Measured on SmolLM2 a 4-bit index chooses within noise of an oracle that knows all scores, where pages and landmarks do
not (METHODS.md). The budget is not a fixed k: a step takes as many tokens as its estimated attention mass needs, one
count for all heads of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sessiond.errors import InvalidConfig
from sessiond.kernels.coded import BITS
from sessiond.kernels.heaviest import Enough
from sessiond.kernels.sieved import SieveIndex
from sessiond.policies.base import LayerView, ModelFacts, Policy, Scan, Selector
from sessiond.policies.keyindex import QuantizedKeys
from sessiond.policies.knobs import share, whole
from sessiond.policies.quantized import bytes_per_row


@dataclass(frozen=True, slots=True)
class Sieve(Policy):
    """Attend to the fewest tokens whose estimated weights reach `mass`: at least `least`, at most `most`.

    `bits`: of a key's numbers in the index. `dense_layers`: so many first layers attend to everything.
    """

    name: ClassVar[str] = "sieve"
    offloads: ClassVar[bool] = True
    bits: int = 4
    mass: float = 0.99
    least: int = 64
    most: int = 512
    dense_layers: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            told = f"policy {self.name!r}: bits must be one of {BITS}, not {self.bits!r}"
            raise InvalidConfig(told, policy=self.name, knob="bits", range=str(BITS))
        share(self.name, "mass", self.mass)
        whole(self.name, "most", self.most, 1, 1 << 20)
        whole(self.name, "least", self.least, 1, self.most)
        whole(self.name, "dense_layers", self.dense_layers, 0, 1 << 10)

    def index_bytes(self, model: ModelFacts) -> int:
        layers = sum(layer >= self.dense_layers for layer in model.attending)
        return layers * model.n_kv_heads * bytes_per_row(model.head_dim, self.bits) * 5 // 4  # and its room to grow

    def selector(self, layer: int, n_layers: int) -> Selector | None:
        return None if layer < self.dense_layers else SieveSelector(self, layer)


class SieveSelector(Selector):
    def __init__(self, policy: Sieve, layer: int) -> None:
        self._policy = policy
        self._layer = layer
        self._index = QuantizedKeys(policy.bits)
        self._enough = Enough(policy.mass, policy.least, policy.most)

    @property
    def nbytes(self) -> int:
        return self._index.nbytes

    def keep(self, n: int) -> None:
        self._index.keep(n)

    @property
    def scan(self) -> Scan | None:
        return Scan(f"{self._policy.bits}-bit keys", self._index.n, self._index.used(self._index.n))

    def prompt(self, view: LayerView) -> None:
        """Take the piece's keys along, unless much is missing: the first token does not wait for that."""
        if self._index.n >= min(view.start, view.turn_start):
            self._index.extend(view.keys)

    def rest(self, view: LayerView) -> None:
        self._index.extend(view.keys)

    def compiled(self, end: int) -> SieveIndex | None:
        tiles = self._index.for_next(end)
        return None if tiles is None else SieveIndex(tiles, self._policy.bits, self._enough)

    def compiled_done(self, end: int) -> None:
        self._index.took_next(end)

    def step(self, view: LayerView) -> Tensor:
        """Weights are estimated over all earlier tokens, the turn's own among them: what those hold is not missing."""
        self._index.extend(view.keys)
        n_groups, n, head_dim = view.keys.shape
        query = view.query.reshape(n_groups, -1, head_dim)
        prior = None if view.prior is None else view.prior.rows(self._layer)
        return self._index.heaviest(query, n, view.turn_start, view.scaling, self._enough, prior)
