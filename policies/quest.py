"""Quest (Tang et al. 2024, arXiv 2406.10774): at every step, the pages whose keys could match the query best.

A page's bound is never below the true score of any of its keys. Nothing is lost: each step chooses anew among all.
The paper's pages are of 16 tokens; on heads of 64 channels pages of 4 agree far better with full attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sessiond.kernels.page_bounds import positions_of
from sessiond.policies.base import LayerView, ModelFacts, Policy, Scan, Selector
from sessiond.policies.choosing import top
from sessiond.policies.knobs import whole
from sessiond.policies.pages import Pages


@dataclass(frozen=True, slots=True)
class Quest(Policy):
    """Attend to `budget` earlier tokens, in pages of `page`, and to the turn's own; all in the first `dense_layers`."""

    name: ClassVar[str] = "quest"
    page: int = 4
    budget: int = 512
    dense_layers: int = 2

    def __post_init__(self) -> None:
        whole(self.name, "page", self.page, 1, 1024)
        whole(self.name, "budget", self.budget, self.page, 1 << 20)
        whole(self.name, "dense_layers", self.dense_layers, 0, 1024)

    def index_bytes(self, model: ModelFacts) -> int:
        """Two bounds of each channel for a page, in the keys' dtype, and their room to grow."""
        layers = sum(layer >= self.dense_layers for layer in model.attending)
        return layers * 2 * model.n_kv_heads * model.head_dim * model.itemsize * 5 // (4 * self.page) + 1

    def selector(self, layer: int, n_layers: int) -> Selector | None:
        return None if layer < self.dense_layers else QuestSelector(self)


class QuestSelector(Selector):
    """The pages of the tokens before the turn; a turn adds its own when the next one begins to decode."""

    def __init__(self, policy: Quest) -> None:
        self._n_chosen = policy.budget // policy.page
        self._pages = Pages(policy.page)

    @property
    def nbytes(self) -> int:
        return self._pages.nbytes

    def keep(self, n: int) -> None:
        self._pages.keep(n)

    @property
    def scan(self) -> Scan | None:
        pages = self._pages
        return Scan("page bounds", pages.length, pages.read_bytes) if pages.n_pages > self._n_chosen else None

    def step(self, view: LayerView) -> Tensor | None:
        self._pages.cover(view.keys, view.turn_start)
        if self._pages.n_pages <= self._n_chosen:
            return None
        bounds = self._pages.best(view.grouped[:, :, 0])
        return positions_of(top(bounds, self._n_chosen), self._pages.size, view.turn_start)
