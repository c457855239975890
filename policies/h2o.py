"""H2O, heavy-hitter oracle (Zhang et al. 2023, arXiv 2306.14048): what was looked at most so far, and the newest.

A position's score is the sum of the attention weights it ever got, in prompts and in decoding, among what took part.
The original evicts the lowest scores; here the score is the order in which positions cease to take part; none is lost.
Only what takes part gets weight, and the turn's own tokens take no place from history: so the choice cannot change
within a turn, and is made once in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sessiond.policies.base import LayerView, ModelFacts, Policy, Selector
from sessiond.policies.choosing import summed_weights, top
from sessiond.policies.knobs import whole


@dataclass(frozen=True, slots=True)
class H2O(Policy):
    """Attend to `budget` tokens of history: the `recent` newest of it, and of the others the highest scores."""

    name: ClassVar[str] = "h2o"
    budget: int = 512
    recent: int = 256

    def __post_init__(self) -> None:
        whole(self.name, "budget", self.budget, 1, 1 << 20)
        whole(self.name, "recent", self.recent, 0, self.budget)

    @property
    def dense_prompt(self) -> bool:
        return False

    def index_bytes(self, model: ModelFacts) -> int:
        """Three accounts of a score for each head, fp32."""
        return len(model.attending) * model.n_kv_heads * 12

    def selector(self, layer: int, n_layers: int) -> Selector:
        return H2OSelector(self)


@dataclass(frozen=True, slots=True)
class Account:
    """The scores [G, <= end] of positions, from the weights of queries below `end`. Never changed in place."""

    end: int
    scores: Tensor


class H2OSelector(Selector):
    """Chooses as a turn starts; if history has no scores yet, after the turn's prompt has attended to all of it."""

    def __init__(self, policy: H2O) -> None:
        self._policy = policy
        self._turn_start = 0
        self._end = 0
        self._chosen: Tensor | None = None
        # Accounts to go back to: as the turn started, and after its prompt. The last one is what counts now.
        self._started: Account | None = None
        self._prompted: Account | None = None
        self._now: Account | None = None

    @property
    def nbytes(self) -> int:
        accounts = {id(account): account for account in (self._started, self._prompted, self._now) if account}
        chosen = 0 if self._chosen is None else self._chosen.nbytes
        return chosen + sum(account.scores.nbytes for account in accounts.values())

    def keep(self, n: int) -> None:
        """Goes back to the last account without queries from `n` on: the prompt's end, the turn's start, or none."""
        if n >= self._end:
            return
        self._end = n
        if self._started is not None and n < self._started.end:
            self._started = self._chosen = None
        if self._prompted is not None and n < self._prompted.end:
            self._prompted = None
            self._chosen = self._chosen if self._started is not None else None
        self._now = self._prompted or self._started

    def renew(self, n: int) -> None:
        """Votes are for tokens, which stay the same."""

    def prompt(self, view: LayerView) -> Tensor | None:
        self._enter(view)
        self._add(view)
        self._prompted = self._now
        return self._chosen

    def step(self, view: LayerView) -> Tensor | None:
        """None in a turn that was resumed after its prompt, if history has no scores."""
        self._enter(view)
        if self._chosen is None and self._prompted is not None:
            self._choose(self._prompted)
        self._add(view)
        return self._chosen

    def _enter(self, view: LayerView) -> None:
        """Starts another turn's account; what is computed again is forgotten first."""
        self.keep(view.start)
        if view.turn_start == self._turn_start:
            return
        self._turn_start = view.turn_start
        self._started, self._prompted, self._chosen = self._now, None, None
        if self._started is not None:
            self._choose(self._started)

    def _choose(self, account: Account) -> None:
        n_old = max(0, self._turn_start - self._policy.recent)
        known = F.pad(account.scores, (0, max(0, n_old - account.scores.shape[1])))[:, :n_old]
        heavy = top(known, self._policy.budget - self._policy.recent)
        recent = torch.arange(n_old, self._turn_start).expand(len(heavy), -1)
        self._chosen = torch.cat([heavy, recent], dim=1)

    def _add(self, view: LayerView) -> None:
        n_groups, n_tokens = view.keys.shape[:2]
        scores = view.keys.new_zeros((n_groups, 0), dtype=torch.float32) if self._now is None else self._now.scores
        scores = F.pad(scores, (0, n_tokens - scores.shape[1]))
        positions = taking_part(view, self._chosen)
        self._now = Account(n_tokens, scores.scatter_add(1, positions, received(view, positions)))
        self._end = n_tokens


def taking_part(view: LayerView, chosen: Tensor | None) -> Tensor:
    """Positions [G, K]: those chosen from history and the turn's own, or all."""
    n_groups, n_tokens = view.keys.shape[:2]
    if chosen is None:
        return torch.arange(n_tokens).expand(n_groups, -1)
    own = torch.arange(view.turn_start, n_tokens).expand(n_groups, -1)
    return torch.cat([chosen, own], dim=1)


def received(view: LayerView, positions: Tensor) -> Tensor:
    """What each of `positions` [G, K] gets of the new queries' softmax weights over them, causal, fp32: [G, K]."""
    keys = view.keys.gather(1, positions[..., None].expand(-1, -1, view.keys.shape[2]))
    at = torch.arange(view.start, view.keys.shape[1])
    return summed_weights(view.query, at, keys, positions, view.scaling)
