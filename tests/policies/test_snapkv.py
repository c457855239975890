"""SnapKV against loops: votes of the prompt's last queries, pooled, and the best of them per key/value head."""

from __future__ import annotations

import pytest
import torch
from policy_views import G, H, Layer, best, rows, weights

from sessiond.errors import InvalidConfig, UnknownPolicy
from sessiond.policies.registry import parse
from sessiond.policies.snapkv import SnapKV

HISTORY, PROMPT_END = 63, 86


def votes(layer: Layer, queries: range, n: int, kernel: int) -> list[list[float]]:
    """Scores [G][n]: the definition."""
    scores = []
    for group in range(G):
        sums = [0.0] * n
        for at in queries:
            for head in range(group * (H // G), (group + 1) * (H // G)):
                for p, weight in enumerate(weights(layer, head, at, list(range(queries.stop)))[:n]):
                    sums[p] += weight
        reach = kernel // 2
        scores.append([max(sums[max(0, p - reach) : p + reach + 1]) for p in range(n)])
    return scores


def expected(layer: Layer, policy: SnapKV, queries: range, n: int) -> list[list[int]]:
    return [best(scores, policy.budget) for scores in votes(layer, queries, n, policy.kernel)]


def first_turn(layer: Layer, policy: SnapKV, end: int):
    """A selector that has seen a prompt of `end` tokens from the start of the session, and one decoded token."""
    selector = policy.selector(0, 30)
    layer.prompt(selector, [end], 0)
    assert layer.step(selector, end, 0) is None
    return selector


@pytest.mark.parametrize(("budget", "window", "kernel"), [(10, 7, 5), (1, 1, 1), (17, 23, 7), (63, 4, 3), (64, 64, 3)])
def test_chosen_are_the_best_pooled_votes_of_the_observation_window(budget, window, kernel):
    layer, policy = Layer(90), SnapKV(budget, window, kernel)
    selector = policy.selector(0, 30)
    assert layer.prompt(selector, [PROMPT_END], HISTORY) == [None]
    queries = range(max(HISTORY, PROMPT_END - window), PROMPT_END)
    chosen = rows(layer.step(selector, PROMPT_END, HISTORY))
    assert chosen == expected(layer, policy, queries, HISTORY)
    assert rows(layer.step(selector, PROMPT_END + 1, HISTORY)) == chosen


@pytest.mark.parametrize("pieces", [[70, 80, 86], [64, 65, 66, 86], [85, 86], list(range(64, 87))])
def test_several_pieces_choose_as_one(pieces):
    layer, policy = Layer(90), SnapKV(10, 7, 5)
    whole, cut = policy.selector(0, 30), policy.selector(0, 30)
    layer.prompt(whole, [PROMPT_END], HISTORY)
    assert layer.prompt(cut, pieces, HISTORY) == [None] * len(pieces)
    assert torch.equal(layer.step(cut, PROMPT_END, HISTORY), layer.step(whole, PROMPT_END, HISTORY))


def test_what_comes_after_the_prompt_changes_nothing():
    layer, policy = Layer(90), SnapKV(10, 7, 5)
    early, late = policy.selector(0, 30), policy.selector(0, 30)
    layer.prompt(early, [PROMPT_END], HISTORY)
    layer.prompt(late, [PROMPT_END], HISTORY)
    layer.query[:, PROMPT_END + 1 :] *= -1
    assert torch.equal(layer.step(early, PROMPT_END, HISTORY), layer.step(late, 89, HISTORY))


def test_each_turn_chooses_anew_from_all_of_history():
    layer, policy = Layer(120), SnapKV(10, 7, 5)
    selector = policy.selector(0, 30)
    layer.prompt(selector, [PROMPT_END], HISTORY)
    before = rows(layer.step(selector, PROMPT_END, HISTORY))
    assert layer.prompt(selector, [110], 90) == [None]
    after = rows(layer.step(selector, 110, 90))
    assert after == expected(layer, policy, range(103, 110), 90)
    assert after != before


def test_a_turn_resumed_after_its_prompt_attends_to_all():
    layer, policy = Layer(120), SnapKV(10, 7, 5)
    assert layer.step(policy.selector(0, 30), PROMPT_END, HISTORY) is None
    selector = policy.selector(0, 30)
    layer.prompt(selector, [PROMPT_END], HISTORY)
    assert layer.step(selector, 110, 100) is None


def test_a_prompt_begun_again_is_observed_once():
    layer, policy = Layer(90), SnapKV(10, 30, 5)
    selector, again = policy.selector(0, 30), policy.selector(0, 30)
    layer.prompt(selector, [PROMPT_END], HISTORY)
    layer.prompt(again, [70, 75], HISTORY)
    layer.prompt(again, [70, PROMPT_END], HISTORY)
    assert torch.equal(layer.step(selector, PROMPT_END, HISTORY), layer.step(again, PROMPT_END, HISTORY))


@pytest.mark.parametrize("pieces", [[86], [65, 86]])
def test_the_engine_may_use_its_query_buffer_again(pieces):
    layer, policy = Layer(90), SnapKV(10, 23, 5)
    selector = policy.selector(0, 30)
    layer.prompt(selector, pieces, HISTORY)
    layer.query[:, :PROMPT_END] = 0
    assert rows(layer.step(selector, PROMPT_END, HISTORY)) == expected(Layer(90), policy, range(63, 86), HISTORY)


def test_keep_forgets_the_queries_that_are_gone():
    layer, policy = Layer(90), SnapKV(10, 7, 5)
    selector = policy.selector(0, 30)
    layer.prompt(selector, [PROMPT_END], HISTORY)
    chosen = rows(layer.step(selector, PROMPT_END, HISTORY))
    selector.keep(PROMPT_END)
    assert rows(layer.step(selector, PROMPT_END, HISTORY)) == chosen
    selector.keep(PROMPT_END - 3)
    assert rows(layer.step(selector, PROMPT_END - 3, HISTORY)) == expected(layer, policy, range(79, 83), HISTORY)
    selector.keep(HISTORY)
    assert layer.step(selector, PROMPT_END, HISTORY) is None
    layer.prompt(selector, [PROMPT_END], HISTORY)
    assert rows(layer.step(selector, PROMPT_END, HISTORY)) == chosen


def test_once_keeps_the_first_prompts_choice_and_all_that_came_later():
    layer, policy = Layer(120), SnapKV(20, 7, 5, once=True)
    selector = first_turn(layer, policy, 60)
    chosen = [best(scores, 13) + list(range(53, 60)) for scores in votes(layer, range(53, 60), 53, 5)]
    second = [row + list(range(60, 75)) for row in chosen]
    assert [rows(piece) for piece in layer.prompt(selector, [80, 90], 75)] == [second, second]
    assert rows(layer.step(selector, 90, 75)) == second
    assert rows(layer.step(selector, 101, 100)) == [row + list(range(60, 100)) for row in chosen]


def test_once_chooses_from_history_where_there_is_one():
    layer = Layer(120)
    once, policy = SnapKV(10, 7, 5, once=True), SnapKV(10, 7, 5)
    selector = once.selector(0, 30)
    assert layer.prompt(selector, [PROMPT_END], HISTORY) == [None]
    chosen = expected(layer, policy, range(79, 86), HISTORY)
    assert rows(layer.step(selector, PROMPT_END, HISTORY)) == chosen
    assert rows(layer.prompt(selector, [110], 90)[0]) == [row + list(range(HISTORY, 90)) for row in chosen]


def test_once_chooses_again_when_the_first_prompt_is_gone():
    layer, policy = Layer(120), SnapKV(20, 7, 5, once=True)
    selector = first_turn(layer, policy, 60)
    layer.prompt(selector, [90], 75)
    selector.keep(75)
    assert len(rows(layer.prompt(selector, [90], 75)[0])[0]) == 20 + 15
    selector.keep(10)
    assert layer.prompt(selector, [90], 10) == [None]


def test_once_keeps_a_first_prompt_shorter_than_the_window():
    layer = Layer(60)
    selector = first_turn(layer, SnapKV(20, 7, 5, once=True), 5)
    assert rows(layer.prompt(selector, [40], 8)[0]) == [list(range(8))] * G


def test_only_the_original_has_sparse_prompts():
    assert SnapKV().dense_prompt
    assert not SnapKV(once=True).dense_prompt


def test_bf16_keys_are_scored_in_fp32():
    layer, policy = Layer(90, dtype=torch.bfloat16), SnapKV(10, 7, 5)
    selector = policy.selector(0, 30)
    layer.prompt(selector, [PROMPT_END], HISTORY)
    assert rows(layer.step(selector, PROMPT_END, HISTORY)) == expected(layer, policy, range(79, 86), HISTORY)


@pytest.mark.parametrize("policy", [SnapKV(), SnapKV(3, 4, 5, once=True)])
def test_knobs_round_trip(policy):
    assert parse("snapkv", policy.knobs()) == policy
    assert parse("snapkv", {k: v if isinstance(v, bool) else float(v) for k, v in policy.knobs().items()}) == policy


@pytest.mark.parametrize(
    ("knob", "value"),
    [("budget", 0), ("budget", 1.5), ("window", 0), ("window", True), ("kernel", 6), ("kernel", -1), ("once", 1)],
)
def test_a_knob_outside_its_range_is_named_with_the_range(knob, value):
    with pytest.raises(InvalidConfig) as caught:
        parse("snapkv", {knob: value})
    assert caught.value.metadata["policy"] == "snapkv"
    assert caught.value.metadata["knob"] == knob
    assert caught.value.metadata["range"]


def test_an_unknown_knob_is_refused():
    with pytest.raises(UnknownPolicy):
        parse("snapkv", {"pages": 4})
