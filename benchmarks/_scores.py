"""What one answer is worth, and what many say about a method: paired with full history's, question by question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _dialogue import Turn
from _pairing import interval, mean, retention, slope
from torch import Tensor

QUOTABLE = 0.6  # share of right answers with full history from which on accuracy says something


@dataclass(frozen=True)
class Score:
    """Of one answer: `nll` of the gold tokens and `kl` from full history in nats a token; `right` of a choice."""

    conversation: int
    turn: int
    kind: str
    age: int
    nll: float
    kl: float
    exact: bool
    match: float
    choice: int | None
    right: bool | None
    kls: tuple[float, ...] = ()  # position by position
    top1: tuple[float, float] = (0.0, 0.0)  # positions where full history's first token is decided; agreed on of them


def score(turn: Turn, logits: Tensor, reference: Tensor, conversation: int, number: int) -> Score:
    """`logits` and `reference` [len(answer), V], of a method and of full history, given the gold tokens before."""
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    gold = torch.tensor(turn.answer)
    hits = logits.argmax(-1) == gold
    choice = turn.choices[int(logits[0, turn.choices].argmax())] if turn.choices else None
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    first, second = p.exp().topk(2, -1).values.unbind(-1)
    decided = first - second >= 0.1
    agreed = decided & (reference.argmax(-1) == logits.argmax(-1))
    return Score(
        conversation,
        number,
        turn.kind,
        turn.age,
        nll=float(-q.gather(1, gold[:, None]).mean()),
        kl=float(kl.mean()),
        exact=bool(hits.all()),
        match=float(hits.double().mean()),
        choice=choice,
        right=None if choice is None or turn.kind == "new" else choice == turn.answer[0],
        kls=tuple(kl.tolist()),
        top1=(float(decided.sum()), float(agreed.sum())),
    )


def summary(full: Sequence[Score], method: Sequence[Score]) -> dict[str, Any]:
    """Of one task. `full` and `method` answer the same questions in the same order."""
    pairs = list(zip(full, method, strict=True))
    told = {
        "n": len(pairs),
        "conversations": len({m.conversation for _, m in pairs}),
        "kl_mean": mean([m.kl for _, m in pairs]),
        **_positions(method),
        "delta_nll": mean([m.nll - f.nll for f, m in pairs]),
        "delta_nll_95": _interval(pairs, lambda some: mean([m.nll - f.nll for f, m in some])),
        "exact": mean([float(m.exact) for _, m in pairs]),
        "token_match": mean([m.match for _, m in pairs]),
        "kl_by_turn": by_turn(method),
        "kl_slope": slope([(m.turn, m.kl) for m in method]),
        "kl_slope_95": _interval(pairs, lambda some: slope([(m.turn, m.kl) for _, m in some])),
    }
    chosen = [(f, m) for f, m in pairs if f.right is not None and m.right is not None]
    if chosen:
        told |= _choices(chosen)
    told["agrees"] = mean([float(f.choice == m.choice) for f, m in pairs if f.choice is not None])
    return told


def _positions(scores: Sequence[Score]) -> dict[str, Any]:
    """Over the positions of all answers; nothing where those are not known."""
    kl = torch.tensor([x for one in scores for x in one.kls], dtype=torch.float64)
    if not len(kl):
        return {}
    decided, agreed = (sum(part) for part in zip(*(one.top1 for one in scores), strict=True))
    told = {f"kl_p{q}": float(kl.quantile(q / 100)) for q in (50, 95, 99)}
    return {**told, "kl_max": float(kl.max()), "top1_decided": agreed / decided if decided else None}


def _choices(pairs: list[tuple[Score, Score]]) -> dict[str, Any]:
    first = [(f, m) for f, m in pairs if m.kind != "again"]
    again = [(f, m) for f, m in pairs if m.kind == "again"]
    told = {
        "right": mean([float(bool(m.right)) for _, m in pairs]),
        **retention([bool(f.right) for f, _ in first], [bool(m.right) for _, m in first]),
        "retention_95": _interval(first, _kept),
        "right_slope": slope([(m.turn, float(bool(m.right))) for _, m in first]),
    }
    if again:
        told["retention_again"] = _kept(again)
    return told


def _kept(pairs: Iterable[tuple[Score, Score]]) -> float | None:
    return mean([float(bool(m.right)) for f, m in pairs if f.right])


def _interval(
    pairs: list[tuple[Score, Score]], statistic: Callable[[list[tuple[Score, Score]]], float | None]
) -> list[float] | None:
    clusters: dict[int, list[tuple[Score, Score]]] = {}
    for pair in pairs:
        clusters.setdefault(pair[0].conversation, []).append(pair)
    return interval(clusters, statistic)


def by_turn(scores: Sequence[Score]) -> list[float]:
    """Mean KL of each turn, in their order."""
    found: dict[int, list[float]] = {}
    for one in scores:
        found.setdefault(one.turn, []).append(one.kl)
    return [sum(some) / len(some) for _, some in sorted(found.items())]


def quotable(full: Sequence[Score]) -> bool:
    """Whether full history answers often enough for a share of right answers to mean anything."""
    right = [float(s.right) for s in full if s.right is not None]
    return bool(right) and (mean(right) or 0.0) >= QUOTABLE
