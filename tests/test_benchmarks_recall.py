"""Task T0: its conversations, its model's training and its scores; what policies lose takes the trained model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_benchmarks import load
from torch import Tensor

from sessiond.model import Model
from sessiond.policies.full import Full
from sessiond.policies.prior import Prior
from sessiond.policies.registry import parse

SEEDS = range(20)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_recall_model")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_recall_start")


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_recall_task")


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_recall_score")


@pytest.fixture
def recall(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = load(monkeypatch, "recall")
    monkeypatch.setattr(found, "spin_as_the_daemon", lambda: None)
    monkeypatch.setattr(found.torch, "set_num_threads", lambda n: None)  # other tests run in this process
    return found


def tiny(training: ModuleType, **changes: Any) -> Any:
    """A recipe that trains in a second."""
    stages = (training.Stage(16, 2, 3, 2e-3, 2e-3), training.Stage(24, 1, 2, 1e-3, 0.0))
    return dataclasses.replace(training.Recipe(), keys=96, values=31, stages=stages, **changes)


# --- conversations


def test_facts_are_told_before_they_are_asked_and_asked_once(training: ModuleType, task: ModuleType) -> None:
    recipe, shape = training.Recipe(), task.Shape()
    for seed in SEEDS:
        turns = task.conversation(recipe, shape, seed)
        told: dict[int, tuple[int, list[int]]] = {}
        asked = []
        for number, turn in enumerate(turns):
            tokens = turn.prompt[1:] if number == 0 else turn.prompt
            for key, *values in triples(tokens):
                assert key not in told
                told[key] = (number, values)
            assert told[tokens[-1]] == (turn.told, turn.answer)
            assert turn.told < number or number == 0
            asked.append(tokens[-1])
        assert len(told) == shape.n_facts
        assert len(set(asked)) == shape.turns


def triples(tokens: list[int]) -> list[list[int]]:
    return [tokens[i : i + 3] for i in range(0, len(tokens) - 1, 3)]


def test_a_seed_is_a_conversation(training: ModuleType, task: ModuleType) -> None:
    recipe, shape = training.Recipe(), task.Shape()
    assert task.conversation(recipe, shape, 7) == task.conversation(recipe, shape, 7)
    assert task.conversation(recipe, shape, 7) != task.conversation(recipe, shape, 8)


def test_asks_are_of_every_age(training: ModuleType, task: ModuleType) -> None:
    shape = task.Shape(turns=6, first=10, later=10)
    seen = {
        (number, turn.told)
        for seed in range(200)
        for number, turn in enumerate(task.conversation(training.Recipe(), shape, seed))
    }
    assert seen == {(0, 0)} | {(number, told) for number in range(1, 6) for told in range(number)}


def test_a_shape_counts_its_tokens(training: ModuleType, task: ModuleType) -> None:
    shape = task.Shape(turns=3, first=5, later=2)
    turns = task.conversation(training.Recipe(), shape, 0)
    lengths = [len(turn.prompt) + len(turn.answer) for turn in turns]
    assert lengths[0] == shape.history
    assert sum(lengths) == shape.n_tokens


# --- training


def test_training_texts_ask_every_fact_after_telling_it(training: ModuleType) -> None:
    draw = torch.Generator().manual_seed(3)
    ids, asks = training.texts(training.Recipe(), 2, 9, draw)
    assert ids.shape == (2, 1 + 2 * 9 * 3)
    for text, places in zip(ids.tolist(), asks.tolist(), strict=True):
        for place in places:
            [first] = [at for at in range(1, place, 3) if text[at] == text[place]]
            assert text[first : first + 3] == text[place : place + 3]


def test_a_turned_bias_prefers_its_distance(start: ModuleType, training: ModuleType) -> None:
    module = training.untrained(tiny(training))
    frequencies = module.model.rotary_emb.inv_freq
    key = start._preference(64, torch.Generator().manual_seed(0))
    for back in (1, 2):
        query = start.turned(key, frequencies, -back)
        at = [start.turned(key, frequencies, -distance) @ query for distance in range(200)]
        assert max(range(200), key=lambda distance: float(at[distance])) == back


def test_the_start_is_above_chance_and_training_adds_to_it(training: ModuleType) -> None:
    recipe = tiny(training)
    before = training.accuracy(training.untrained(recipe), recipe, 16)
    assert before > 3 / recipe.values  # far from 1 / values ** 2
    stages = (training.Stage(16, 4, 25, 2e-3, 0.0),)
    assert training.accuracy(training.train(dataclasses.replace(recipe, stages=stages)), recipe, 16) > before


def test_training_is_deterministic(training: ModuleType) -> None:
    first, second = (training.train(tiny(training)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_is_trained_once_and_loads(training: ModuleType, task: ModuleType, tmp_path: Path) -> None:
    recipe, lines = tiny(training), []
    path, seconds = training.trained(recipe, 16, 0.0, lines.append, tmp_path)
    assert seconds > 0
    assert len(lines) == len(recipe.stages) + 1
    assert training.trained(recipe, 16, 0.0, lines.append, tmp_path) == (path, 0.0)
    assert training.trained(dataclasses.replace(recipe, seed=2), 16, 0.0, lines.append, tmp_path)[0] != path
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith("recall-")] == []
    assert Model.load(path).module.dtype is torch.bfloat16


def test_a_model_that_recalls_too_little_is_not_kept(training: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="recalls"):
        training.trained(tiny(training), 16, 1.01, lambda line: None, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- sessions


@pytest.fixture
def model(training: ModuleType, tmp_path: Path) -> Model:
    path, _ = training.trained(tiny(training), 16, 0.0, lambda line: None, tmp_path)
    return Model.load(path)


def test_the_policies_start_each_turn_from_full_attentions_kv(
    training: ModuleType, task: ModuleType, model: Model
) -> None:
    turns = task.conversation(tiny(training), task.Shape(turns=3, first=20, later=4), 0)
    reference, cache = model.new_cache(), model.new_cache()
    task.converse(model, Full(), turns, reference, reference)
    heard = task.converse(model, parse("window", {"sinks": 1, "recent": 4}), turns, cache, reference)
    assert cache.length == reference.length == sum(len(turn.prompt) + len(turn.answer) for turn in turns)
    for layer in range(2):
        assert torch.equal(cache.keys[layer], reference.keys[layer])
        assert torch.equal(cache.values[layer], reference.values[layer])
    assert all(share < 0.2 for share in heard.attended)
    assert len(heard.attended) == 2 * 2 * 2  # two later turns, two values fed, two layers


def test_a_policy_that_sees_everything_answers_as_full_attention(
    training: ModuleType, task: ModuleType, model: Model
) -> None:
    turns = task.conversation(tiny(training), task.Shape(turns=4, first=20, later=4), 1)
    reference = model.new_cache()
    full = task.converse(model, Full(), turns, reference, reference)
    sieve = parse("sieve", {"least": 4096, "most": 4096})
    assert task.converse(model, sieve, turns, model.new_cache(), reference).answers == full.answers
    own = task.converse(model, Full(), turns, model.new_cache()), task.converse(model, sieve, turns, model.new_cache())
    assert own[0].answers == own[1].answers


def test_own_answers_become_history(training: ModuleType, task: ModuleType, model: Model) -> None:
    turns = task.conversation(tiny(training), task.Shape(turns=2, first=20, later=4), 2)
    wrong = [dataclasses.replace(turns[0], answer=[127, 127]), turns[1]]
    gold, own, other = (model.new_cache() for _ in range(3))
    task.converse(model, Full(), wrong, gold, gold)
    task.converse(model, Full(), wrong, own)
    task.converse(model, Full(), turns, other)
    at = len(turns[0].prompt)
    assert torch.equal(own.keys[0], other.keys[0])  # the right answer is told to nobody
    assert not torch.equal(own.keys[0][:, at], gold.keys[0][:, at])


def test_a_history_is_scored_between_turns(training: ModuleType, task: ModuleType, model: Model) -> None:
    turns = task.conversation(tiny(training), task.Shape(turns=2, first=20, later=4), 3)
    reference, cache, seen = model.new_cache(), model.new_cache(), []

    def score(model: Model, cache: Any, ids: list[int]) -> Prior:
        seen.append((list(ids), None if cache.selection.prior is None else cache.selection.prior.n))
        return Prior(torch.zeros(2, 2, len(ids), dtype=torch.float16))

    task.converse(model, Full(), turns, reference, reference)
    task.converse(model, parse("sieve", {}), turns, cache, reference, score)
    first = [*turns[0].prompt, *turns[0].answer]
    assert seen == [(first, None), ([*first, *turns[1].prompt, *turns[1].answer], len(first))]


def test_a_failing_policy_gives_no_figure(
    training: ModuleType, task: ModuleType, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("a policy's own")

    turns = task.conversation(tiny(training), task.Shape(turns=2, first=20, later=4), 0)
    monkeypatch.setattr("sessiond.policies.window.WindowSelector.step", broken)
    with pytest.raises(ZeroDivisionError):
        task.converse(model, parse("window", {}), turns, model.new_cache())


# --- scores


def rows(*text: str) -> Tensor:
    return torch.tensor([[letter == "1" for letter in row] for row in text])


def test_retention_is_of_what_full_attention_gets(score: ModuleType) -> None:
    found = score.retention(rows("110", "111", "101"), rows("100", "111", "110"))
    assert torch.allclose(found, torch.tensor([1.0, 0.5, 0.5]).double())


def test_a_turn_without_any_gives_no_figure(score: ModuleType) -> None:
    with pytest.raises(ValueError, match="gets no ask right"):
        score.retention(rows("10", "10"), rows("11", "11"))


def test_slope_is_in_points_per_turn(score: ModuleType) -> None:
    full = torch.ones(100, 3, dtype=torch.bool)
    method = full.clone()
    method[:10, 1], method[:20, 2] = False, False
    assert math.isclose(score.slope(full, method), -10.0)


def test_the_interval_of_no_loss_is_a_point(score: ModuleType) -> None:
    full = torch.ones(30, 12, dtype=torch.bool)
    assert score.slope_interval(full, full, 200) == (0.0, 0.0)


def test_the_interval_is_by_conversation(score: ModuleType) -> None:
    """The same losses lie in few conversations or in many: the bootstrap of asks would not tell these apart."""
    full = torch.ones(60, 12, dtype=torch.bool)
    late = torch.arange(12) >= 6
    clustered, spread = full.clone(), full.clone()
    clustered[:6] &= ~late
    for turn in range(6, 12):
        spread[10 * (turn - 6) : 10 * (turn - 6) + 6, turn] = False
    assert math.isclose(score.slope(full, clustered), score.slope(full, spread))
    wide, narrow = (score.slope_interval(full, method) for method in (clustered, spread))
    assert wide[1] - wide[0] > 1.8 * (narrow[1] - narrow[0])
    assert wide[0] < score.slope(full, clustered) < wide[1] < 0


def test_the_intervals_cover_the_true_slope(score: ModuleType) -> None:
    draw = torch.Generator().manual_seed(5)
    chances = torch.linspace(1.0, 0.78, 12)  # -2 points a turn
    full = torch.ones(80, 12, dtype=torch.bool)
    held = 0
    for _ in range(100):
        method = torch.rand(80, 12, generator=draw) < chances
        low, high = score.slope_interval(full, method, 400)
        held += low <= -2.0 <= high
    assert 88 <= held <= 100


def test_first_asks_are_later_turns_that_full_attention_gets(score: ModuleType) -> None:
    full = rows("1010", "1000", "1111", "0111")
    chosen = score.first_asks(full, 1)
    assert chosen[0] == 2
    assert chosen[1] == -1
    assert set(chosen[2:].tolist()) <= {1, 2, 3}
    many = score.first_asks(torch.ones(300, 12, dtype=torch.bool), 1)
    assert set(many.tolist()) == set(range(1, 12))


@pytest.mark.parametrize(("lost", "won", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (3, 1, 0.625), (2, 2, 1.0), (0, 9, 2**-8)])
def test_mcnemar_is_exact(score: ModuleType, lost: int, won: int, p: float) -> None:
    assert math.isclose(score.mcnemar(lost, won), p)


def test_three_over_n_bounds_what_was_never_seen(score: ModuleType) -> None:
    assert score.loss_bound(0, 300) == 0.01
    assert score.loss_bound(1, 300) is None


# --- policies


def test_every_policy_chooses_in_both_layers(recall: ModuleType) -> None:
    for name, policy in recall.policies(144).items():
        assert all(policy.selector(layer, 2) is not None for layer in range(2)), name


def test_a_loss_is_bounded_by_later_turns_only(recall: ModuleType) -> None:
    """In the first turn there is nothing to lose."""
    result = recall.Result(right=[[False, True, True, True]] * 5, index_bytes=[0.0])
    told = recall.told(result, torch.ones(5, 4, dtype=torch.bool), torch.full((5,), 1), 1)
    assert told["only_full_right"] == 5
    assert told["loss_bound"] == 3 / 15


def test_a_policy_that_is_not_here_is_an_error(
    recall: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recall, "trained", lambda *given: (tmp_path, 0.0))
    monkeypatch.setattr(recall.Model, "load", lambda path: None)
    monkeypatch.setattr("sys.argv", ["recall.py", "--policies", "sieve", "seive"])
    with pytest.raises(SystemExit, match="seive"):
        recall.main()


# --- the whole


def test_the_benchmark_prints_its_figures_last(
    training: ModuleType,
    task: ModuleType,
    recall: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recall, "TARGET", 0.0)
    recipe = tiny(training)
    recipe = dataclasses.replace(recipe, stages=(training.Stage(24, 4, 25, 2e-3, 2e-3),))
    monkeypatch.setattr(recall, "Recipe", lambda: recipe)
    monkeypatch.setattr(recall, "Shape", lambda: task.Shape(turns=2, first=40, later=4))
    command = ["recall.py", "--conversations", "30", "--models", str(tmp_path), "--policies", "sieve", "window"]
    monkeypatch.setattr("sys.argv", command)
    recall.main()
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["t0_window"] <= found["t0_sieve"] <= found["t0_asks"] <= 30
    assert len(found["slope_sieve_ci"]) == 2
    assert found["policies"]["window"]["attended"] < 0.2
    assert found["policies"]["sieve"]["index_bytes_per_token"] > 0
    assert any(line.startswith("| sieve | ") for line in lines)
