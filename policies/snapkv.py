"""SnapKV (Li et al. 2024, arXiv 2404.14469): the end of the prompt shows what the answer will look at.

The last queries of the prompt, the observation window, vote for positions of history; a max-pool over positions keeps
the neighbours of what they chose. Here the choice is made anew in every turn, over all of history, and holds for the
turn. With `once` it is the original: what the first prompt did not choose never takes part again. (It is not lost:
another policy finds it.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sessiond.policies.base import LayerView, Policy, Selector
from sessiond.policies.choosing import ascending, summed_weights, top
from sessiond.policies.knobs import flag, odd, whole

# From scores [G, N] to positions [G, K] below N, ascending, -1 at the end of shorter rows.
Pick = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SnapKV(Policy):
    """Attend to the `budget` tokens of history that the prompt's last `window` queries look at most, per KV head.

    `kernel` is the width of the max-pool. With `once` the first prompt's own window is part of the budget, as there.
    """

    name: ClassVar[str] = "snapkv"
    budget: int = 512
    window: int = 32
    kernel: int = 7
    once: bool = False

    def __post_init__(self) -> None:
        check(self.name, self.budget, self.window, self.kernel, self.once)

    @property
    def dense_prompt(self) -> bool:
        return not self.once

    def selector(self, layer: int, n_layers: int) -> Selector:
        return self.selector_with(lambda scores: top(scores, self.budget))

    def selector_with(self, pick: Pick) -> Selector:
        """A selector that gives its scores to `pick`, for policies that divide the budget differently."""
        return SnapKVSelector(self, pick)


def check(policy: str, budget: object, window: object, kernel: object, once: object) -> None:
    """SnapKV's knobs, for the policy of that name. Raises InvalidConfig."""
    whole(policy, "budget", budget, 1, 1 << 20)
    whole(policy, "window", window, 1, 512)
    odd(policy, "kernel", kernel, 1, (1 << 10) - 1)
    flag(policy, "once", once)


@dataclass(frozen=True, slots=True)
class Observed:
    """The last queries [H, W, D] of a turn's prompt, as far as it was seen: they stand at [end - W, end)."""

    queries: Tensor
    end: int
    turn_start: int

    @property
    def start(self) -> int:
        return self.end - self.queries.shape[1]

    def followed_by(self, view: LayerView, size: int) -> Observed:
        """The last `size` queries, of this window and of the next piece of the same prompt."""
        joined = torch.cat([self.queries, view.query[:, -size:]], dim=1)
        return Observed(joined[:, -size:], view.keys.shape[1], self.turn_start)

    def before(self, n: int) -> Observed | None:
        """What stands before position `n`, or None."""
        return replace(self, queries=self.queries[:, : n - self.start], end=n) if n > self.start else None

    def scores(self, view: LayerView, n: int, kernel: int) -> Tensor:
        """Votes for positions below `n`: [G, n]. Summed over the window and each head's queries, then max-pooled.

        If `n` reaches into the window, its own positions score infinity and are not pooled.
        """
        places, n_voted = torch.arange(self.end), min(n, self.start)
        keys = view.keys[:, : self.end]
        votes = summed_weights(self.queries, places[self.start :], keys, places, view.scaling)[:, :n_voted]
        if n_voted:
            votes = F.max_pool1d(votes, kernel, stride=1, padding=kernel // 2)
        return F.pad(votes, (0, n - n_voted), value=float("inf"))


# In the turn that chooses, without `once` or when there was history:
#   [0, turn_start)   chosen from           [turn_start, T)   the turn's own, all take part
# With `once`, when the first prompt had no history before it:
#   [0, end)          chosen from, for later turns; the window [start, end) first
class SnapKVSelector(Selector):
    def __init__(self, policy: SnapKV, pick: Pick) -> None:
        self._policy = policy
        self._pick = pick
        self._window: Observed | None = None
        self._chosen: Tensor | None = None

    @property
    def nbytes(self) -> int:
        held = [self._chosen, None if self._window is None else self._window.queries]
        return sum(part.nbytes for part in held if part is not None)

    def keep(self, n: int) -> None:
        """Drops the queries from `n` on, and a choice in which they had a vote."""
        if self._window is not None and n < self._window.end:
            self._window = self._window.before(n)
            self._chosen = None

    def renew(self, n: int) -> None:
        """Votes are for tokens, which stay the same."""

    def prompt(self, view: LayerView) -> Tensor | None:
        window = self._window
        if window is not None and self._policy.once and window.turn_start != view.turn_start:
            return self._kept(window, view)
        if window is None or (window.turn_start, window.end) != (view.turn_start, view.start):
            window = Observed(view.query[:, :0], view.start, view.turn_start)
        self._window = window.followed_by(view, self._policy.window)
        self._chosen = None
        return None

    def step(self, view: LayerView) -> Tensor | None:
        """None in a turn that was resumed after its prompt."""
        window = self._window
        if window is None or (window.turn_start != view.turn_start and not self._policy.once):
            return None
        return self._kept(window, view)

    def _kept(self, window: Observed, view: LayerView) -> Tensor | None:
        """What was chosen from the first `n` positions, and all of history that came after them."""
        n = window.turn_start or window.end
        if view.turn_start < n:
            return None
        if self._chosen is None:
            self._chosen = self._pick(window.scores(view, n, self._policy.kernel))
        if view.turn_start == n:
            return self._chosen
        later = torch.arange(n, view.turn_start).expand(len(self._chosen), -1)
        return ascending(torch.cat([self._chosen, later], dim=1))
