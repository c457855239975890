"""H2O against loops: every position's attention weights so far, among what took part."""

from __future__ import annotations

import pytest
import torch
from policy_views import G, H, Layer, best, rows, weights

from sessiond.errors import InvalidConfig, UnknownPolicy
from sessiond.policies import choosing as module
from sessiond.policies.h2o import H2O
from sessiond.policies.registry import parse

POLICY = H2O(budget=15, recent=6)


class Definition:
    """Scores [G][position] and choices, one query at a time."""

    def __init__(self, layer: Layer, policy: H2O) -> None:
        self.layer, self.policy = layer, policy
        self.scores = [[0.0] * layer.keys.shape[1] for _ in range(G)]

    def choose(self, turn_start: int) -> list[list[int]]:
        n_old = max(0, turn_start - self.policy.recent)
        recent = list(range(n_old, turn_start))
        return [best(row[:n_old], self.policy.budget - self.policy.recent) + recent for row in self.scores]

    def add(self, start: int, end: int, turn_start: int, chosen: list[list[int]]) -> None:
        for head in range(H):
            group = head // (H // G)
            for at in range(start, end):
                part = chosen[group] + list(range(turn_start, at + 1))
                for p, weight in zip(part, weights(self.layer, head, at, part), strict=True):
                    self.scores[group][p] += weight


def everything(n: int) -> list[list[int]]:
    return [list(range(n))] * G


def run_turn(layer: Layer, selector, turn_start: int, pieces: list[int], end: int):
    """One turn: the prompt's pieces, then decoding to `end`. Returns every answer."""
    answers = layer.prompt(selector, pieces, turn_start)
    return [*answers, *(layer.step(selector, at, turn_start) for at in range(pieces[-1], end))]


def test_later_turns_attend_to_what_was_looked_at_most_and_to_the_newest():
    layer, truth = Layer(80), Definition(Layer(80), POLICY)
    selector = POLICY.selector(0, 30)
    first = run_turn(layer, selector, 0, [30], 34)
    assert first[0] is None
    assert [rows(answer) for answer in first[1:]] == [[[]] * G] * 4
    truth.add(0, 34, 0, everything(0))
    for turn_start, pieces, end in ((34, [40, 41], 45), (45, [63], 66)):
        chosen = truth.choose(turn_start)
        answers = run_turn(layer, selector, turn_start, pieces, end)
        assert [rows(answer) for answer in answers] == [chosen] * len(answers)
        truth.add(turn_start, end, turn_start, chosen)
        # Choosing at every step would choose the same: what does not take part gets no weight.
        assert truth.choose(turn_start) == chosen


def test_history_without_scores_is_attended_whole_while_the_prompt_scores_it():
    layer, truth = Layer(80), Definition(Layer(80), POLICY)
    selector = POLICY.selector(0, 30)
    answers = run_turn(layer, selector, 40, [50, 55], 58)
    assert answers[:2] == [None, None]
    truth.add(40, 55, 40, everything(40))
    assert [rows(answer) for answer in answers[2:]] == [truth.choose(40)] * 3


def test_a_turn_resumed_after_its_prompt_attends_to_all_and_is_scored():
    layer, truth = Layer(80), Definition(Layer(80), POLICY)
    selector = POLICY.selector(0, 30)
    assert [layer.step(selector, at, 40) for at in range(50, 54)] == [None] * 4
    truth.add(50, 54, 40, everything(40))
    assert rows(layer.prompt(selector, [60], 54)[0]) == truth.choose(54)


@pytest.mark.parametrize("pieces", [[10, 30], [1, 2, 3, 30], [29, 30]])
def test_several_pieces_choose_as_one(pieces):
    layer = Layer(80)
    whole, cut = POLICY.selector(0, 30), POLICY.selector(0, 30)
    run_turn(layer, whole, 0, [30], 34)
    run_turn(layer, cut, 0, pieces, 34)
    assert torch.equal(layer.prompt(whole, [40], 34)[0], layer.prompt(cut, [40], 34)[0])


def test_queries_taken_in_blocks_give_the_same_choice(monkeypatch):
    layer = Layer(80)
    whole, cut = POLICY.selector(0, 30), POLICY.selector(0, 30)
    run_turn(layer, whole, 0, [63], 64)
    monkeypatch.setattr(module, "AT_ONCE", 5)
    run_turn(layer, cut, 0, [63], 64)
    assert torch.equal(layer.prompt(whole, [70], 64)[0], layer.prompt(cut, [70], 64)[0])


@pytest.mark.parametrize("told", [True, False])
def test_a_turn_begun_again_is_counted_once(told):
    layer = Layer(120)
    plain, again = POLICY.selector(0, 30), POLICY.selector(0, 30)
    for selector in (plain, again):
        run_turn(layer, selector, 0, [30], 34)
    run_turn(layer, again, 34, [60], 70)
    if told:
        again.keep(34)
    expected, found = (run_turn(layer, selector, 34, [40, 60], 66) for selector in (plain, again))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(layer.prompt(plain, [80], 66)[0], layer.prompt(again, [80], 66)[0])


def test_keep_within_decoding_goes_back_to_the_prompts_end():
    layer, truth = Layer(80), Definition(Layer(80), POLICY)
    selector = POLICY.selector(0, 30)
    run_turn(layer, selector, 0, [30], 40)
    selector.keep(36)
    truth.add(0, 30, 0, everything(0))
    assert rows(layer.prompt(selector, [50], 36)[0]) == truth.choose(36)


def test_keep_within_an_earlier_turn_forgets_all():
    layer = Layer(80)
    selector = POLICY.selector(0, 30)
    run_turn(layer, selector, 0, [30], 34)
    run_turn(layer, selector, 34, [40], 45)
    selector.keep(20)
    assert layer.prompt(selector, [50], 20) == [None]


def test_keep_forgets_a_choice_made_by_the_prompt():
    layer = Layer(80)
    selector = POLICY.selector(0, 30)
    run_turn(layer, selector, 40, [50], 52)
    selector.keep(45)
    assert selector.prompt(layer.view(45, 50, 40)) is None
    selector.keep(45)
    assert layer.step(selector, 45, 40) is None


@pytest.mark.parametrize("policy", [H2O(15, 0), H2O(15, 15), H2O(1, 1), H2O(100, 6), H2O(34, 6)])
def test_the_budget_is_what_is_kept_of_history(policy):
    layer = Layer(80)
    selector = policy.selector(0, 30)
    run_turn(layer, selector, 0, [30], 34)
    kept = rows(layer.prompt(selector, [40], 34)[0])
    n_recent = min(policy.recent, 34)
    assert [len(row) for row in kept] == [min(policy.budget, 34)] * G
    assert all(row[len(row) - n_recent :] == list(range(34 - n_recent, 34)) for row in kept)


def test_bf16_keys_are_scored_in_fp32():
    layer = Layer(80, dtype=torch.bfloat16)
    selector, truth = POLICY.selector(0, 30), Definition(layer, POLICY)
    run_turn(layer, selector, 0, [30], 34)
    truth.add(0, 34, 0, everything(0))
    assert rows(layer.prompt(selector, [40], 34)[0]) == truth.choose(34)


@pytest.mark.parametrize("policy", [H2O(), H2O(3, 0), H2O(7, 7)])
def test_knobs_round_trip(policy):
    assert parse("h2o", policy.knobs()) == policy
    assert parse("h2o", {knob: float(value) for knob, value in policy.knobs().items()}) == policy


@pytest.mark.parametrize(("knob", "value"), [("budget", 0), ("budget", "8"), ("recent", -1), ("recent", 513)])
def test_a_knob_outside_its_range_is_named_with_the_range(knob, value):
    with pytest.raises(InvalidConfig) as caught:
        parse("h2o", {knob: value})
    assert caught.value.metadata["policy"] == "h2o"
    assert caught.value.metadata["knob"] == knob
    assert caught.value.metadata["range"]


def test_an_unknown_knob_is_refused():
    with pytest.raises(UnknownPolicy):
        parse("h2o", {"window": 4})
