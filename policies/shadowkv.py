"""ShadowKV (Sun et al. 2024, arXiv 2410.21465): keys of low rank, values fetched for the chunks that landmarks choose.

Before their rotary embedding the keys of a session are of low rank: what a step chooses is made from few numbers a
token. A chunk is chosen by its mean key. Chunks that no mean stands for are outliers; they take part always, exactly,
and above all the attention sink is in one. So do the newest chunks and the tokens that fill none.

On SmolLM2 the sink's chunk is the worst of all from the middle layers on; without outliers the mean KL from full
attention was 34 times as large (two chats of 4,096 tokens, 240 tokens attended).

Beyond the paper: later turns are factored, landmarked and chosen from like the first (its ShadowKV+ keeps the first
basis); the keys' mean is kept apart from the factors; and outliers and newest chunks are within the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sessiond.errors import InvalidConfig
from sessiond.policies.base import LayerView, ModelFacts, Policy, Scan, Selector, Taken
from sessiond.policies.choosing import top
from sessiond.policies.knobs import share, whole
from sessiond.policies.landmarks import Landmarks
from sessiond.policies.lowrank import LowRank


@dataclass(frozen=True, slots=True)
class ShadowKV(Policy):
    """Attend to `budget` earlier tokens in chunks of `chunk`: of them `outliers` and the newest `local` chunks exactly.

    `rank`: of all keys of a layer, joined; 0: what holds the share `energy` of what varies in them. New tokens that
    lose a share of `drift` more than those factored before have all factored again. The paper's 48 outliers beside a
    budget of 2,048 tokens are 12 here.
    """

    name: ClassVar[str] = "shadowkv"
    offloads: ClassVar[bool] = True
    rank: int = 0
    energy: float = 0.96
    chunk: int = 8
    budget: int = 512
    outliers: int = 12
    local: int = 4
    drift: float = 0.05

    def __post_init__(self) -> None:
        whole(self.name, "rank", self.rank, 0, 1 << 16)
        share(self.name, "energy", self.energy)
        share(self.name, "drift", self.drift)
        whole(self.name, "chunk", self.chunk, 1, 1024)
        whole(self.name, "outliers", self.outliers, 0, 1 << 16)
        whole(self.name, "local", self.local, 0, 1 << 16)
        whole(self.name, "budget", self.budget, (self.outliers + self.local + 1) * self.chunk, 1 << 20)

    def fits(self, model: ModelFacts) -> None:
        """Raises InvalidConfig for a rank above the number of all keys' channels."""
        Policy.fits(self, model)
        whole(self.name, "rank", self.rank, 0, model.n_kv_heads * model.head_dim)

    def index_bytes(self, model: ModelFacts) -> int:
        """Coordinates in a basis as wide as it may get, landmarks, and over the whole context the sums in fp32."""
        width = model.n_kv_heads * model.head_dim
        sums = (4 + 2) * width * width // model.max_context
        return len(model.attending) * (2 * ((self.rank or width) + width // self.chunk) + 5 * model.n_kv_heads + sums)

    def selector(self, layer: int, n_layers: int) -> Selector:
        return ShadowKVSelector(self)


class ShadowKVSelector(Selector):
    """Factors of the keys at [0, turn_start), landmarks of the whole chunks there."""

    # [0, ranked)           chunks to choose from, some of them outliers
    # [ranked, turn_start)  the newest whole chunks, and tokens that fill none: kept
    def __init__(self, policy: ShadowKV) -> None:
        self._policy = policy
        self._factors = LowRank(policy.rank, policy.energy, policy.drift)
        self._landmarks = Landmarks(policy.chunk)
        self._outliers: tuple[int, Tensor] | None = None  # chunks to choose from, and which of them [G, P] bool
        self._scan: Scan | None = None

    @property
    def nbytes(self) -> int:
        outliers = self._outliers[1].nbytes if self._outliers else 0
        return self._factors.nbytes + self._landmarks.nbytes + outliers

    @property
    def scan(self) -> Scan | None:
        return self._scan

    def keep(self, n: int) -> None:
        self._factors.keep(n)
        self._landmarks.keep(n)
        self._outliers = None

    def renew(self, n: int) -> None:
        """The basis is no copy of keys: it stays as long as it holds them."""
        self._factors.renew(n)
        self._landmarks.keep(n)
        self._outliers = None

    def prompt(self, view: LayerView) -> None:
        self._cover(view)

    def rest(self, view: LayerView) -> None:
        self._cover(view)

    def step(self, view: LayerView) -> Taken | None:
        self._cover(view)
        policy, self._scan = self._policy, None
        n_ranked = max(0, view.turn_start // policy.chunk - policy.local)
        n_chosen = policy.budget // policy.chunk - policy.local
        if n_ranked <= n_chosen:
            return None
        outliers = self._outliers_of(n_ranked)
        weights = self._weights(view, outliers)
        chunks = top(weights.masked_fill(outliers, torch.inf), n_chosen)
        positions = (chunks[..., None] * policy.chunk + torch.arange(policy.chunk)).flatten(1)
        kept = torch.arange(n_ranked * policy.chunk, view.turn_start).expand(len(positions), -1)
        exact = outliers.gather(1, chunks).repeat_interleave(policy.chunk, 1)
        exact = torch.cat([exact, torch.ones_like(kept, dtype=torch.bool)], 1)
        return self._taken(view, torch.cat([positions, kept], 1), exact)

    def _cover(self, view: LayerView) -> None:
        """What a turn chooses from was there before it."""
        rope, keys = view.rope, view.keys
        if rope is None:
            told = f"policy {self._policy.name!r}: the keys of this model have no rotary embedding that can be undone"
            raise InvalidConfig(told, policy=self._policy.name, knob="name", range="any other policy")

        def rows(start: int, end: int) -> Tensor:
            plain = rope.undo(keys[:, start:end].float(), torch.arange(start, end))
            return plain.transpose(0, 1).flatten(1)

        self._factors.cover(rows, view.turn_start)
        self._landmarks.cover(keys, view.turn_start)

    def _outliers_of(self, n_ranked: int) -> Tensor:
        """Which of the first `n_ranked` chunks are outliers: [G, P] bool. They stay the same all turn."""
        if self._outliers is None or self._outliers[0] != n_ranked:
            coherence = self._landmarks.coherence[:, :n_ranked]
            found = torch.zeros_like(coherence, dtype=torch.bool)
            if self._policy.outliers:
                found.scatter_(1, top(-coherence, self._policy.outliers), value=True)
            self._outliers = n_ranked, found
        return self._outliers[1]

    def _weights(self, view: LayerView, outliers: Tensor) -> Tensor:
        """A query's softmax weights over the landmarks that are no outliers, the most of a group's heads: [G, P]."""
        means = self._landmarks.means[:, : outliers.shape[1]]
        self._scan = Scan("landmarks", means.shape[1] * self._policy.chunk, means.numel() * means.element_size())
        scores = view.grouped[:, :, 0].float() @ means.float().mT * view.scaling
        return scores.masked_fill(outliers[:, None], -torch.inf).softmax(-1).amax(1)

    def _taken(self, view: LayerView, positions: Tensor, exact: Tensor) -> Taken:
        """Keys at `positions` [G, K], those from the factors that are not `exact` [G, K]."""
        assert view.rope is not None
        keys = self._factors.keys(positions, exact, view.keys, view.rope)
        n_exact = int(exact.sum()) // len(exact)
        return Taken(positions, keys, None, "low rank", self._factors.nbytes, n_exact)
