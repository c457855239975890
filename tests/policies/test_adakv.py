"""Ada-KV against loops: one budget over a layer's heads, with a floor for each."""

from __future__ import annotations

import pytest
import torch
from policy_views import G, Layer, rows

from sessiond.errors import InvalidConfig, UnknownPolicy
from sessiond.policies.adakv import AdaKV, top_across_heads
from sessiond.policies.registry import parse
from sessiond.policies.snapkv import SnapKV


def definition(scores: list[list[float]], budget: int, floor: float) -> list[list[int]]:
    """The floor of each row first; then one position after another, the highest that is left."""
    taken: list[set[int]] = [set() for _ in scores]

    def take(candidates: list[tuple[int, int]]) -> None:
        row, position = min(candidates, key=lambda c: (-scores[c[0]][c[1]], c))
        taken[row].add(position)

    for row in range(len(scores)):
        for _ in range(min(int(floor * budget), len(scores[row]))):
            take([(row, p) for p in range(len(scores[row])) if p not in taken[row]])
    while sum(map(len, taken)) < min(budget, len(scores[0])) * len(scores):
        take([(row, p) for row in range(len(scores)) for p in range(len(scores[row])) if p not in taken[row]])
    return [sorted(row) for row in taken]


@pytest.mark.parametrize("floor", [0.01, 0.2, 0.7, 1, 1.0])
@pytest.mark.parametrize("budget", [1, 9, 20, 62, 63, 64])
@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_heads_share_a_budget_above_their_floors(budget, floor, rounded):
    scores = torch.randn(G, 63, generator=torch.Generator().manual_seed(budget)).exp() * torch.tensor([[3], [1], [0.2]])
    scores = scores.round() if rounded else scores
    assert rows(top_across_heads(scores, budget, floor)) == definition(scores.tolist(), budget, floor)


def test_a_head_that_looks_at_few_keeps_its_floor():
    scores = torch.ones(3, 100)
    scores[1] = 0
    assert [len(row) for row in rows(top_across_heads(scores, 30, 0.2))] == [78, 6, 6]
    scores[2] = 2
    assert [len(row) for row in rows(top_across_heads(scores, 30, 0.2))] == [6, 6, 78]


def test_budget_is_that_of_snapkv_and_is_divided_otherwise():
    layer = Layer(120)
    layer.keys[0] *= 3
    ada, snap = AdaKV(budget=10, window=7).selector(0, 30), SnapKV(10, 7).selector(0, 30)
    for selector in (ada, snap):
        assert layer.prompt(selector, [100, 110], 90) == [None, None]
    ragged, even = rows(layer.step(ada, 110, 90)), rows(layer.step(snap, 110, 90))
    assert sum(map(len, ragged)) == sum(map(len, even)) == 10 * G
    assert len({len(row) for row in ragged}) > 1
    for mine, theirs in zip(ragged, even, strict=True):
        assert set(mine) <= set(theirs) or set(theirs) <= set(mine)


def test_with_a_whole_floor_it_is_snapkv():
    layer = Layer(120)
    ada, snap = AdaKV(floor=1, budget=10, window=7).selector(0, 30), SnapKV(10, 7).selector(0, 30)
    for selector in (ada, snap):
        layer.prompt(selector, [110], 90)
    assert torch.equal(layer.step(ada, 110, 90), layer.step(snap, 110, 90))


def test_once_pads_at_the_end_of_rows_that_grow():
    layer = Layer(120)
    layer.keys[0] *= 3
    selector = AdaKV(budget=20, window=7, once=True).selector(0, 30)
    layer.prompt(selector, [60], 0)
    kept = rows(layer.prompt(selector, [90], 75)[0])
    assert sum(map(len, kept)) == 20 * G + 15 * G
    assert len({len(row) for row in kept}) > 1
    assert all(row[-22:] == list(range(53, 75)) for row in kept)


def test_prompts_are_as_those_of_the_policy_that_scores():
    assert AdaKV().dense_prompt
    assert not AdaKV(once=True).dense_prompt


@pytest.mark.parametrize("policy", [AdaKV(), AdaKV("snapkv", 0.5, 100, 16, 5, once=True), AdaKV(floor=1)])
def test_knobs_round_trip(policy):
    assert parse("adakv", policy.knobs()) == policy
    assert parse("adakv", {"floor": 0.5, "budget": 100.0}) == AdaKV(floor=0.5, budget=100)


@pytest.mark.parametrize(
    ("knob", "value"), [("scores", "h3o"), ("scores", 1), ("floor", 0), ("floor", 1.1), ("budget", 0), ("kernel", 2)]
)
def test_a_knob_outside_its_range_is_named_with_the_range(knob, value):
    with pytest.raises(InvalidConfig) as caught:
        parse("adakv", {knob: value})
    assert caught.value.metadata["policy"] == "adakv"
    assert caught.value.metadata["knob"] == knob
    assert caught.value.metadata["range"]


def test_an_unknown_knob_is_refused():
    with pytest.raises(UnknownPolicy):
        parse("adakv", {"alpha": 0.2})
