"""RocketKV in its multi-turn form, RocketKV-MT (Behnam et al. 2025, arXiv 2502.14051 v2).

Stage 1, once a turn: a turn set of all earlier tokens, by the prompt's last queries. Stage 2, at every step: the best
tokens of the turn set, by pages' bounds in the query's strongest channels. All tokens stay; a turn chooses among all.

Beyond the paper: a prompt shorter than the window borrows the queries of the tokens before it, so the window is always
the newest tokens of the text; and budgets follow the history's length, anew each turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from sessiond.kernels import rocket
from sessiond.policies.base import LayerView, Policy, Scan, Selector
from sessiond.policies.choosing import summed_weights, top
from sessiond.policies.knobs import whole
from sessiond.policies.observing import Observed
from sessiond.policies.pages import Pages


@dataclass(frozen=True, slots=True)
class RocketKV(Policy):
    """`budget` is the traffic of a step in tokens per key/value head: half to estimate with, half to attend to.

    `window` queries are observed, `carry` of them at most from before the turn; `kernel` widens what they look at to
    its neighbours; `max_new` is the answer's expected length.
    """

    name: ClassVar[str] = "rocketkv"
    budget: int = 512
    window: int = 32
    kernel: int = 63
    carry: int = 4096
    max_new: int = 256

    def __post_init__(self) -> None:
        whole(self.name, "budget", self.budget, 2, 1 << 20)
        whole(self.name, "window", self.window, 1, 512)
        whole(self.name, "kernel", self.kernel, 1, 4095)
        whole(self.name, "carry", self.carry, 0, 4096)
        whole(self.name, "max_new", self.max_new, 1, 1 << 20)

    def selector(self, layer: int, n_layers: int) -> Selector:
        return RocketKVSelector(self)

    def split(self, n: int, head_dim: int) -> Split:
        """How the compression of `n` tokens and an answer is divided between the stages.

        What stage 1 keeps grows with `n` up to some hundred times the budget, and is then all but constant.
        """
        total = n + self.max_new
        ratio = max(1.0, total / self.budget)
        share = min(0.2 + 0.06 * math.log2(ratio), 0.8)
        capacity = max(int(total / ratio**share), min(2 * self.max_new, total))
        rest = max(1.0, capacity / self.budget)
        page = math.ceil(math.sqrt(rest))
        page = page if page <= rest else 1
        channels = max(1, int(head_dim * page / rest))
        return Split(capacity - self.max_new, page, channels, self.budget // 2)


@dataclass(frozen=True, slots=True)
class Split:
    """Tokens kept by stage 1, the window among them; stage 2's tokens of a page, channels, and chosen tokens."""

    kept: int
    page: int
    channels: int
    chosen: int


class RocketKVSelector(Selector):
    def __init__(self, policy: RocketKV) -> None:
        self._policy = policy
        self._observed = Observed(policy.window)
        self._prompt: range | None = None  # the turn's prompt as far as it was seen, from the turn's beginning
        self._turn: TurnSet | None = None  # chosen at the turn's first step

    @property
    def nbytes(self) -> int:
        return self._observed.nbytes + (self._turn.nbytes if self._turn else 0)

    @property
    def scan(self) -> Scan | None:
        return self._turn.scan if self._turn else None

    def keep(self, n: int) -> None:
        self._observed.keep(n)
        if self._prompt is not None and n < self._prompt.stop:
            self._prompt = self._turn = None
        elif self._turn is not None:
            self._turn.keep(n)

    def renew(self, n: int) -> None:
        """The queries stay; the turn set's pages summarize keys."""
        self._turn = None

    def prompt(self, view: LayerView) -> None:
        self._observed.watch(view.query, view.start)
        self._turn = None
        # A piece that ends before the turn is history computed again.
        n = view.keys.shape[1]
        self._prompt = range(view.turn_start, n) if n > view.turn_start else None

    def step(self, view: LayerView) -> Tensor | None:
        chosen = self._choose(view)
        self._observed.watch(view.query, view.start)
        return chosen

    def _choose(self, view: LayerView) -> Tensor | None:
        """Stage 2's choice; all where history is small, or where the turn goes on whose prompt was not seen."""
        seen = self._prompt is not None and self._prompt.start == view.turn_start
        if not seen or view.turn_start <= self._policy.budget // 2:
            return None
        if self._turn is None:
            split = self._policy.split(view.start, view.keys.shape[-1])
            self._turn = TurnSet(self._turn_positions(view, split), view, split)
        return self._turn.choose(view)

    def _turn_positions(self, view: LayerView, split: Split) -> Tensor:
        """Stage 1: the turn set's positions [G, F], ascending, all below `turn_start`."""
        query, positions = self._observed.newest(view.turn_start, self._policy.carry)
        # [0, ranked)           the best of these
        # [ranked, turn_start)  in the window: kept
        # [turn_start, start)   the turn's own: they take part unchosen
        ranked = max(0, min(view.start - len(positions), view.turn_start))
        recent = torch.arange(ranked, view.turn_start).expand(view.keys.shape[0], -1)
        if ranked == 0:
            return recent
        keys, places = view.keys[:, : view.start], torch.arange(view.start)
        weights = summed_weights(query, positions, keys, places, view.scaling)[:, :ranked]
        kernel = self._policy.kernel
        pooled = max_pool1d(weights, kernel, stride=1, padding=kernel // 2)[:, :ranked]
        return torch.cat([top(pooled, max(1, split.kept - len(positions))), recent], 1)


class TurnSet:
    """Stage 2: the turn set's positions [G, F], and the pages of its keys and of the turn's own, in that order."""

    def __init__(self, positions: Tensor, view: LayerView, split: Split) -> None:
        self._positions = positions
        self._turn_start = view.turn_start
        self._head_dim = view.keys.shape[-1]
        self._split = split
        self._pages = Pages(split.page)

    @property
    def nbytes(self) -> int:
        return self._positions.nbytes + self._pages.nbytes

    @property
    def scan(self) -> Scan | None:
        """Stage 2 looks at some channels of the bounds; the turn set may be small enough to need none."""
        pages, head_dim = self._pages, self._head_dim
        if not pages.length:
            return None
        return Scan("page bounds", pages.length, pages.read_bytes * self._split.channels // head_dim)

    def keep(self, n: int) -> None:
        """Forget the turn's own keys from `n` on."""
        if n < self._turn_start + self._pages.length - self._positions.shape[1]:
            self._pages = Pages(self._split.page)

    def choose(self, view: LayerView) -> Tensor:
        """The positions [G, K] of the best tokens of the turn set for one query, ascending."""
        n_set = self._positions.shape[1]
        if n_set <= self._split.chosen:
            return self._positions
        if self._pages.length == 0:
            index = self._positions[..., None].expand(-1, -1, view.keys.shape[-1])
            self._pages.extend(view.keys.gather(1, index))
        self._pages.extend(view.keys[:, self._turn_start + self._pages.length - n_set :])
        split = self._split
        among = self._pages.first(n_set)
        places = rocket.choose(view.grouped[:, :, 0], among, split.channels, split.chosen, view.scaling)
        return self._positions.gather(1, places)
