"""Ada-KV (Feng et al. 2024, arXiv 2407.11550): a layer's heads share one budget.

A head whose attention is spread out gets more positions than one that looks at few. It is a way of dividing the budget
of another policy, whose scores it takes: here SnapKV's, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sessiond.policies.base import Policy, Selector
from sessiond.policies.choosing import ascending
from sessiond.policies.knobs import one_of, share
from sessiond.policies.snapkv import SnapKV, check


@dataclass(frozen=True, slots=True)
class AdaKV(Policy):
    """Attend to the best `budget` x G positions of a layer's G key/value heads together; `budget` is a head's mean.

    Each head has at least `floor` of `budget`. `scores` names the policy that scores, whose own knobs are the others.
    """

    name: ClassVar[str] = "adakv"
    scores: str = "snapkv"
    floor: float = 0.2
    budget: int = 512
    window: int = 32
    kernel: int = 7
    once: bool = False

    def __post_init__(self) -> None:
        one_of(self.name, "scores", self.scores, ["snapkv"])
        share(self.name, "floor", self.floor)
        check(self.name, self.budget, self.window, self.kernel, self.once)

    @property
    def dense_prompt(self) -> bool:
        return self._scored_by.dense_prompt

    @property
    def _scored_by(self) -> SnapKV:
        return SnapKV(self.budget, self.window, self.kernel, self.once)

    def selector(self, layer: int, n_layers: int) -> Selector:
        return self._scored_by.selector_with(lambda scores: top_across_heads(scores, self.budget, self.floor))


def top_across_heads(scores: Tensor, budget: int, floor: float) -> Tensor:
    """The `budget` x G highest of `scores` [G, T], but at least `floor` x `budget` of each row: [G, K], -1 padded.

    Ties: the earlier row, then the earlier position.
    """
    n_heads, n_tokens = scores.shape
    if budget >= n_tokens:
        return torch.arange(n_tokens).expand(n_heads, -1)
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    n_safe = int(floor * budget)
    # Rows are ranked and the sort is stable: what a row wins of the rest is the next part of its ranking.
    rest = ranked.values[:, n_safe:].reshape(-1).sort(dim=0, descending=True, stable=True).indices
    winners = rest[: (budget - n_safe) * n_heads] // (n_tokens - n_safe)
    sizes = n_safe + winners.bincount(minlength=n_heads)
    widest = int(sizes.max())
    outside = torch.arange(widest) >= sizes[:, None]
    return ascending(ranked.indices[:, :widest].masked_fill(outside, -1))
