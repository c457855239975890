"""Teacher-forced turns under a policy on KV that all policies share, and how far they are from full attention's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _probe import Probe, probing
from torch import Tensor

from sessiond.cache import SessionCache
from sessiond.model import Feed, Model
from sessiond.policies.base import Policy
from sessiond.selection import Selection

CELL = 128


def prefill(model: Model, cache: SessionCache, ids: Sequence[int], chunk: int = CELL) -> None:
    """Compute `ids` behind what the cache holds, with full attention, `chunk` tokens at a time."""
    for start in range(0, len(ids), chunk):
        piece = ids[start : start + chunk]
        model.step([Feed(cache, piece, cache.length)], [])
        cache.length += len(piece)


def answered(model: Model, cache: SessionCache, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits [len(answer), V] of the answer, a turn on top of what the cache holds, by the cache's selection."""
    rows: list[Tensor] = []
    for start in range(0, len(prompt), CELL):
        piece = prompt[start : start + CELL]
        rows = [model.step([Feed(cache, piece, cache.length, cache.selection)], [len(piece) - 1])[0]]
        cache.length += len(piece)
    for token in answer[:-1]:
        rows.append(model.step([Feed(cache, [token], cache.length, cache.selection, decoding=True)], [0])[0])
        cache.length += 1
    raise_failure(cache)
    return torch.stack(rows)


def raise_failure(cache: SessionCache) -> None:
    """Attention is full where a policy fails: that would be measured in its name."""
    if cache.selection is not None and cache.selection.failure is not None:
        raise cache.selection.failure


@dataclass
class Contender:
    """A policy in one conversation: what its selectors learned stays from turn to turn, while KV is shared."""

    policy: Policy
    probe: Probe = field(default_factory=Probe)
    selection: Selection | None = None
    index_bytes: list[float] = field(default_factory=list)  # per token, at the end of each turn
    hot: list[float] = field(default_factory=list)  # share of bf16 KV's bytes, offloaded if the policy allows it
    seconds: float = 0.0

    def leave(self) -> None:
        """The conversation is over."""
        self.selection = None

    def turn(
        self, model: Model, cache: SessionCache, history: int, prompt: Sequence[int], answer: Sequence[int]
    ) -> Tensor:
        """Logits [len(answer), V]. What stood behind `history` is cleared before; the next turn computes it again."""
        cache.selection = None
        cache.truncate(history, CELL)
        cache.selection = self.selection
        cache.use(self.policy, history)
        between_turns(model, cache)
        began = time.perf_counter()
        with probing(self.probe):
            logits = answered(model, cache, prompt, answer)
        self.seconds += time.perf_counter() - began
        self.selection, cache.selection = cache.selection, None
        if self.selection is not None:
            self.index_bytes.append(self.selection.nbytes / cache.length)
            exact = cache.length * cache.shape.bytes_per_token
            self.hot.append(hot_bytes(cache, self.selection, offloaded=self.policy.offloads) / exact)
            self.selection.renew(history)
        return logits

    def told(self) -> dict[str, Any]:
        n = len(self.index_bytes)
        return {
            **self.probe.told(),
            "index_bytes_per_token": round(sum(self.index_bytes) / n, 1) if n else 0.0,
            "hot_share": round(sum(self.hot) / n, 4) if n else 1.0,
            "seconds": round(self.seconds, 1),
        }


def between_turns(model: Model, cache: SessionCache) -> None:
    """What the daemon does when a turn has ended and nobody waits: selectors catch up before the next prompt exists."""
    if cache.selection is None or cache.length == 0:
        return
    for layer in range(cache.shape.n_layers):
        cache.selection.rest(layer, cache.keys[layer], cache.values[layer], cache.length, model.rope)


def hot_bytes(cache: SessionCache, selection: Selection, *, offloaded: bool) -> int:
    """Bytes that a session takes of the memory the model computes in: indexes, a prior, and the resident exact KV.

    This is the daemon's own count (SessionCache.nbytes), computed; hot_bytes.py measures a real daemon's memory.
    """
    prior = cache.prior.nbytes if cache.prior is not None and selection.policy.wants_prior else 0
    return selection.nbytes + prior + resident_bytes(cache, offloaded=offloaded)


def resident_bytes(cache: SessionCache, *, offloaded: bool) -> int:
    """Of exact keys and values: all, or one layer's at a time where they lie one tier down (SessionCache.nbytes)."""
    exact = cache.length * cache.shape.bytes_per_token
    return exact // cache.shape.n_layers if offloaded else exact


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
