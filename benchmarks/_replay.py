"""Teacher-forced replay under a policy, and how far its distributions are from full attention's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sessiond.cache import SessionCache
from sessiond.model import Feed, Model
from sessiond.policies.base import Policy

CELL = 128


def prefill(model: Model, cache: SessionCache, ids: Sequence[int], chunk: int = CELL) -> None:
    """Compute the history with full attention, `chunk` tokens at a time."""
    for start in range(0, len(ids), chunk):
        piece = ids[start : start + chunk]
        model.step([Feed(cache, piece, start)], [])
        cache.length = start + len(piece)


def replay(
    model: Model, cache: SessionCache, policy: Policy, history: int, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Logits [len(answer), V] of the answer, a turn on top of the `history` tokens that the cache holds."""
    cache.truncate(history, CELL)
    cache.selection = None
    cache.use(policy, history)
    rows = [model.step([Feed(cache, prompt, history, cache.selection)], [len(prompt) - 1])[0]]
    cache.length = history + len(prompt)
    for token in answer[:-1]:
        rows.append(model.step([Feed(cache, [token], cache.length, cache.selection, decoding=True)], [0])[0])
        cache.length += 1
    if cache.selection is not None and cache.selection.failure is not None:
        raise cache.selection.failure
    return torch.stack(rows)


@dataclass
class Distance:
    """Of one policy from full attention, position by position."""

    kl: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    decided: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)

    def add(self, reference: Tensor, logits: Tensor, answer: Sequence[int]) -> None:
        """Both [n, V]; sums in fp64, nats."""
        p, q = (x.double().log_softmax(-1) for x in (reference, logits))
        self.kl += (p.exp() * (p - q)).sum(-1).clamp(min=0).tolist()
        self.same_top += (reference.argmax(-1) == logits.argmax(-1)).tolist()
        first, second = p.exp().topk(2, -1).values.unbind(-1)
        self.decided += (first - second >= 0.1).tolist()
        index = torch.tensor(answer)[:, None]
        self.nll += (p.gather(1, index) - q.gather(1, index))[:, 0].tolist()

    def told(self) -> dict[str, Any]:
        kl = torch.tensor(self.kl, dtype=torch.float64)
        agreed = torch.tensor(self.same_top, dtype=torch.float64)
        decided = torch.tensor(self.decided)
        return {
            "kl_mean": float(kl.mean()),
            "kl_median": float(kl.median()),
            "kl_p95": float(kl.quantile(0.95)),
            "kl_p99": float(kl.quantile(0.99)),
            "kl_max": float(kl.max()),
            "top1": float(agreed.mean()),
            "top1_decided": float(agreed[decided].mean()) if decided.any() else None,
            "delta_nll": float(torch.tensor(self.nll, dtype=torch.float64).mean()),
            "n": len(self.kl),
        }
