"""KVzip (Kim et al. 2025, arXiv 2505.23416): keep what the model needs to repeat the text, whatever is asked later.

Between turns the model is asked to repeat its context; how much it then looks at each token of each layer and head is
that token's score (probing.py, prior.py). The scores are no secret of this policy: they belong to the session. What has
no score yet takes part, as does everything before the first scoring. The original scores once and never again; here
later turns are scored too, and what is left out stays stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sessiond.policies.base import LayerView, ModelFacts, Policy, Selector
from sessiond.policies.knobs import one_of, share, whole
from sessiond.policies.prior import BUDGETS, Prior
from sessiond.policies.probing import CHUNK, LEAST


@dataclass(frozen=True, slots=True)
class KVzip(Policy):
    """Attend to the `share` of history with the best scores, by `budget`: over all layers and heads ("pair"), in each
    head ("pair-uniform"), or in whole heads ("head"). `chunk`: tokens of history that a probe scores at a time.
    """

    name: ClassVar[str] = "kvzip"
    offloads: ClassVar[bool] = True
    wants_prior: ClassVar[bool] = True
    share: float = 0.3
    budget: str = "pair"
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        share(self.name, "share", self.share)
        one_of(self.name, "budget", self.budget, BUDGETS)
        whole(self.name, "chunk", self.chunk, LEAST, 1 << 14)

    def index_bytes(self, model: ModelFacts) -> int:
        """Scores in fp16, the mask of what is kept, and its positions."""
        return model.n_layers * model.n_kv_heads * (2 + 1 + 8)

    @property
    def prior_chunk(self) -> int:
        return self.chunk

    def selector(self, layer: int, n_layers: int) -> Selector:
        return KVzipSelector(self, layer)


# [0, prior.n)           chosen from by score        [prior.n, turn_start)   not scored yet: all of it
# [turn_start, T)        the turn's own
class KVzipSelector(Selector):
    def __init__(self, policy: KVzip, layer: int) -> None:
        self._policy = policy
        self._layer = layer
        self._prior: Prior | None = None  # of which `_chosen` speaks
        self._turn_start = 0
        self._chosen: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._chosen is None else self._chosen.nbytes

    def keep(self, n: int) -> None:
        if n < self._turn_start:
            self._prior = self._chosen = None

    def renew(self, n: int) -> None:
        """Scores are of tokens, which stay the same."""

    def step(self, view: LayerView) -> Tensor | None:
        if view.prior is None:
            return None
        if view.prior is not self._prior or view.turn_start != self._turn_start or self._chosen is None:
            self._prior, self._turn_start = view.prior, view.turn_start
            self._chosen = self._choose(view.prior, view.turn_start)
        return self._chosen

    def _choose(self, prior: Prior, turn_start: int) -> Tensor:
        """The kept positions of each head, [G, K]."""
        kept = prior.kept(self._policy.share, self._policy.budget)[self._layer, :, :turn_start]
        later = torch.arange(kept.shape[1], turn_start)
        rows = [torch.cat([row.nonzero()[:, 0], later]) for row in kept]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
