"""One decode step of many sessions: how far their logits are from those alone, and what --batch-invariant costs."""

from __future__ import annotations

import time
from typing import Any

import torch
from _bench import median, rounded
from torch import Tensor

from sessiond.cache import SessionCache
from sessiond.model import Feed, Model

REPEATS = 9


@torch.inference_mode()
def measure(model: Model, n_sessions: int, n_tokens: int) -> dict[str, Any]:
    """Sessions of `n_tokens` random tokens each decode one more: packed freely, by the limit, and each alone."""
    generator = torch.Generator().manual_seed(0)
    feeds = []
    for _ in range(n_sessions):
        cache = SessionCache(model.shape, model.max_context)
        ids = torch.randint(1000, model.vocab_size, (n_tokens + 1,), generator=generator).tolist()
        model.step([Feed(cache, ids[:n_tokens], 0)], [])
        cache.length = n_tokens
        feeds.append(Feed(cache, ids[n_tokens:], n_tokens, decoding=True))
    limit = model.invariant_rows
    alone = in_forwards(model, feeds, 1)
    times: dict[str, list[float]] = {"free": [], "invariant": []}
    logits: dict[str, Tensor] = {}
    for _ in range(REPEATS):
        for name, most in (("free", n_sessions), ("invariant", limit)):
            began = time.perf_counter()
            logits[name] = in_forwards(model, feeds, most)
            times[name].append(time.perf_counter() - began)
    if not torch.equal(logits["invariant"], alone):
        raise RuntimeError(f"{n_sessions} sessions in forwards of {limit} rows: logits are not those alone")
    free, invariant = median(times["free"]), median(times["invariant"])
    return {
        "sessions": n_sessions,
        "rows_limit": limit,
        "step_ms": rounded(free * 1e3),
        "step_ms_invariant": rounded(invariant * 1e3),
        "cost_of_invariance": rounded(invariant / free - 1),
        **difference(alone, logits["free"]),
    }


def in_forwards(model: Model, feeds: list[Feed], most: int) -> Tensor:
    """Logits [sessions, V] of the next token, at most so many sessions in one forward."""
    parts = [feeds[first : first + most] for first in range(0, len(feeds), most)]
    return torch.cat([model.step(part, range(len(part))) for part in parts])


def difference(alone: Tensor, packed: Tensor) -> dict[str, Any]:
    """Of the sessions' next-token distributions: bits, logits, and KL(alone || packed) in nats."""
    ours, theirs = alone.double().log_softmax(-1), packed.double().log_softmax(-1)
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    return {
        "same_bits": rounded(float((alone == packed).all(-1).double().mean())),
        "same_choice": rounded(float((alone.argmax(-1) == packed.argmax(-1)).double().mean())),
        "most_logit_difference": rounded(float((alone - packed).abs().max())),
        "mean_kl": float(divergence.mean()),
        "most_kl": float(divergence.max()),
    }
