"""RocketKV's two stages in plain loops, and one layer of a session to show to its selector."""

from __future__ import annotations

import math

import torch

from sessiond.policies.base import LayerView
from sessiond.policies.rocketkv import RocketKV, RocketKVSelector, Split

D = 16


class Session:
    """One layer of a session: the queries and keys of all its tokens, shown to a selector as an engine would."""

    def __init__(self, policy: RocketKV, n_heads: int = 9, n_groups: int = 3, n: int = 400) -> None:
        self.query, self.keys = torch.randn(n_heads, n, D), torch.randn(n_groups, n, D)
        self.selector = RocketKVSelector(policy)

    def view(self, start: int, end: int, turn_start: int) -> LayerView:
        keys = self.keys[:, :end]
        return LayerView(self.query[:, start:end], keys, torch.zeros_like(keys), start, turn_start, D**-0.5)

    def prompt(self, start: int, end: int, *cuts: int) -> None:
        for piece in zip((start, *cuts), (*cuts, end), strict=True):
            assert self.selector.prompt(self.view(*piece, start)) is None  # type: ignore[func-returns-value]

    def step(self, position: int, turn_start: int) -> list[list[int]] | None:
        chosen = self.selector.step(self.view(position, position + 1, turn_start))
        if chosen is None:
            return None
        assert chosen.dtype == torch.int64
        for row in chosen.tolist():
            assert row == sorted(set(row))
            assert 0 <= row[0] <= row[-1] < turn_start
        return chosen.tolist()  # type: ignore[no-any-return]


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    total = sum(math.exp(score - top) for score in scores)
    return [math.exp(score - top) / total for score in scores]


def best(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:k])


def stage_one(session: Session, policy: RocketKV, group: int, n: int, turn_start: int, window: int) -> list[int]:
    """The turn set of one group, observed by the `window` tokens before `n`."""
    n_heads = session.query.shape[0] // session.keys.shape[0]
    keys = session.keys[group]
    ranked = min(n - window, turn_start)
    scores = [0.0] * ranked
    for head in range(group * n_heads, (group + 1) * n_heads):
        for position in range(n - window, n):
            products = (keys[: position + 1] @ session.query[head, position] * D**-0.5).tolist()
            for key, weight in enumerate(softmax(products)[:ranked]):
                scores[key] += weight
    half = policy.kernel // 2
    pooled = [max(scores[max(0, i - half) : i + half + 1]) for i in range(ranked)]
    kept = policy.split(n, D).kept
    return [*best(pooled, kept - window), *range(ranked, turn_start)]


def stage_two(session: Session, split: Split, group: int, turn_set: list[int], position: int, own: int) -> list[int]:
    """The chosen tokens of one group, for the token at `position` of a turn whose own tokens begin at `own`."""
    n_heads = session.query.shape[0] // session.keys.shape[0]
    keys = session.keys[group, [*turn_set, *range(own, position + 1)]]
    heads = session.query[group * n_heads : (group + 1) * n_heads, position]
    channels = best(heads.abs().sum(0).tolist(), split.channels)
    weights = [0.0] * len(keys)
    for q in heads:
        scores = []
        for i in range(len(keys)):
            page = keys[i // split.page * split.page :][: split.page]
            score = 0.0
            for c in channels:
                score += float(q[c] * (page[:, c].max() if heads[:, c].sum() > 0 else page[:, c].min()))
            share = float(q[channels].abs().sum() / q.abs().sum())
            scores.append(score / math.sqrt(D * share))
        weights = [a + b for a, b in zip(weights, softmax(scores), strict=True)]
    return [turn_set[i] for i in best(weights[: len(turn_set)], split.chosen)]


def expected(
    session: Session, policy: RocketKV, turn_start: int, n: int, position: int, window: int
) -> list[list[int]]:
    """What a step at `position` attends to, in the turn whose prompt is [turn_start, n)."""
    chosen = []
    for group in range(session.keys.shape[0]):
        turn_set = stage_one(session, policy, group, n, turn_start, window)
        chosen.append(stage_two(session, policy.split(n, D), group, turn_set, position, turn_start))
    return chosen
