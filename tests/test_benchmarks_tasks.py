"""The arithmetic of the quality benchmarks: what is drawn, what an answer is worth, and what many of them say."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from engine_harness import DETOKENIZER, make_pair, random_ids

from sessiond.policies.base import Taken
from sessiond.policies.full import Full
from sessiond.policies.registry import parse

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TEXT = [(f"question {n} about some things", f"reply {n} " + "with quite a few words in it " * 12) for n in range(40)]


class Letters:
    """A tokenizer with a token for every character, and a template of three marks."""

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        return "".join(f"<{m['role'][0]}>{m['content']}</>" for m in messages)


class Backwards(Letters):
    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        return super().apply_chat_template(messages[::-1])


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def tasks(load: Any) -> ModuleType:
    module: ModuleType = load("_tasks")
    return module


@pytest.fixture
def pairing(load: Any) -> ModuleType:
    module: ModuleType = load("_pairing")
    return module


def a_chat(load: Any, seed: int = 3) -> Any:
    return load("_dialogue").Chat(Letters(), TEXT, random.Random(seed))


def texts(conversation: Any) -> list[tuple[str, str]]:
    """Of each turn: all that stands before its answer, and the answer."""
    ids: list[int] = []
    found = []
    for turn in conversation.turns:
        ids += turn.filler + turn.prompt + turn.stem
        found.append((Letters().decode(ids), Letters().decode(turn.answer)))
        ids += turn.answer + turn.closing
    return found


@pytest.mark.parametrize("name", ["T1", "T2", "T3", "T4", "T5", "T6"])
def test_a_task_is_the_same_for_the_same_draw_and_another_for_another(load: Any, tasks: ModuleType, name: str) -> None:
    make = tasks.TASKS[name]
    assert make(a_chat(load)) == make(a_chat(load))
    assert make(a_chat(load)) != make(a_chat(load, 4))


@pytest.mark.parametrize("name", ["T1", "T2", "T3", "T4", "T5", "T6"])
def test_the_answer_is_one_of_the_choices(load: Any, tasks: ModuleType, name: str) -> None:
    for turn in tasks.TASKS[name](a_chat(load)).turns:
        assert turn.answer
        assert not turn.choices or turn.choices[0] == turn.answer[0]
        assert len(set(turn.choices)) == len(turn.choices)


@pytest.mark.parametrize("name", ["T1", "T2", "T3", "T4", "T5", "T6"])
def test_an_answer_is_decoded_after_steps_that_a_policy_chose_for(load: Any, tasks: ModuleType, name: str) -> None:
    """A prompt may attend to all of history, and with it the first token that follows."""
    assert all(turn.stem for turn in tasks.TASKS[name](a_chat(load)).turns)


@pytest.mark.parametrize("seed", range(5))
def test_a_fact_is_told_once_before_it_is_first_asked_for(load: Any, tasks: ModuleType, seed: int) -> None:
    conversation = tasks.late_need(a_chat(load, seed))
    first = [pair for turn, pair in zip(conversation.turns, texts(conversation), strict=True) if turn.kind == "first"]
    assert len(first) == tasks.N_FACTS
    assert all(before.count(f"is {number}.") == 1 for before, number in first)
    assert all(len(turn.choices) == tasks.N_FACTS for turn in conversation.turns)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_asked_again_was_answered_before(load: Any, tasks: ModuleType, seed: int) -> None:
    conversation = tasks.late_need(a_chat(load, seed))
    again = [pair for turn, pair in zip(conversation.turns, texts(conversation), strict=True) if turn.kind == "again"]
    assert again
    assert all(before.count(f"is {number}.") == 2 for before, number in again)


def test_copies_stand_earlier(load: Any, tasks: ModuleType) -> None:
    for before, answer in texts(tasks.copy_back(a_chat(load))):
        assert answer in before


def test_the_current_number_is_the_corrected_one(load: Any, tasks: ModuleType) -> None:
    conversation = tasks.overwrite(a_chat(load))
    for turn, (before, number) in zip(conversation.turns, texts(conversation), strict=True):
        assert (f"is now {number}." in before) == (turn.kind == "current")
        assert len(turn.choices) == 2


def test_seen_names_have_the_label_that_was_shown(load: Any, tasks: ModuleType) -> None:
    conversation = tasks.many_shot(a_chat(load))
    for turn, (before, label) in zip(conversation.turns, texts(conversation), strict=True):
        name = before.rpartition("</><a>")[2].removesuffix(" -> ")
        assert (f"\n{name} -> {label}" in before) == (turn.kind == "seen")


@pytest.mark.parametrize("seed", range(8))
def test_numbers_begin_within_two_of_an_edge(load: Any, tasks: ModuleType, seed: int) -> None:
    conversation = tasks.boundary(a_chat(load, seed), n_tokens=4096)
    text = Letters().decode(conversation.turns[0].filler)
    at = sorted(text.index(f" is {Letters().decode(turn.answer)}.") + 4 for turn in conversation.turns)
    assert at[0] < 0.02 * len(text)
    assert at[-1] > 0.98 * len(text)
    for number, where in enumerate(at[1:-1], 1):
        size = tasks.EDGES[number % len(tasks.EDGES)]
        assert min(where % size, -where % size) <= 2


def test_boundary_names_come_in_pairs_nearly_alike(load: Any, tasks: ModuleType) -> None:
    conversation = tasks.boundary(a_chat(load))
    names = [Letters().decode(turn.prompt).partition(" of the ")[2].partition("?")[0] for turn in conversation.turns]
    assert sum(f"{name}s" in names for name in names) == len(names) // 2


def test_a_template_that_reorders_messages_is_refused(load: Any) -> None:
    with pytest.raises(ValueError, match="order"):
        load("_dialogue").Chat(Backwards(), TEXT, random.Random(1))


def test_candidates_that_begin_alike_are_refused(load: Any) -> None:
    with pytest.raises(ValueError, match="alike"):
        a_chat(load).ask("which?", "it is ", ["17", "18", "25"])
    with pytest.raises(ValueError, match="two candidates"):
        a_chat(load).ask("which?", "it is ", ["17"])


def test_what_all_candidates_share_belongs_to_the_stem(load: Any) -> None:
    prompt, stem, answers = a_chat(load).ask("which?", "it is", [" 17", " 25"])
    assert Letters().decode(prompt) == "which?</><a>"
    assert Letters().decode(stem) == "it is "
    assert [Letters().decode(ids) for ids in answers] == ["17", "25"]


def test_retention_counts_only_what_full_history_knew(pairing: ModuleType) -> None:
    found = pairing.retention([True, True, True, True, False, False], [True, True, True, False, True, False])
    assert found["retention"] == 0.75
    assert found["reverse_flips"] == 0.5
    assert (found["lost"], found["won"]) == (1, 1)


def test_nothing_known_means_no_retention(pairing: ModuleType) -> None:
    assert pairing.retention([False], [True])["retention"] is None


@pytest.mark.parametrize(
    ("lost", "won", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (0, 5, 0.0625), (1, 1, 1.0), (8, 2, 0.109375)]
)
def test_mcnemar_is_exact(pairing: ModuleType, lost: int, won: int, p: float) -> None:
    assert pairing.mcnemar(lost, won) == p


def test_interval_draws_whole_conversations(pairing: ModuleType) -> None:
    apart = {0: [0.0] * 50, 1: [1.0] * 50}
    assert pairing.interval(apart, pairing.mean) == [0.0, 1.0]
    assert pairing.interval({0: [0.0, 1.0] * 25, 1: [0.0, 1.0] * 25}, pairing.mean) == [0.5, 0.5]
    assert pairing.interval({0: [0.0, 1.0]}, pairing.mean) is None


def test_slope_of_a_line(pairing: ModuleType) -> None:
    assert pairing.slope([(0, 1), (1, 3), (2, 5)]) == 2
    assert pairing.slope([(1, 1), (1, 3)]) is None


def figures(kl: float, p99: float, decided: float | None = 1.0) -> dict[str, float | None]:
    return {"kl_mean": kl, "kl_p99": p99, "top1": 0.9, "top1_decided": decided}


@pytest.mark.parametrize(
    ("found", "turns", "word"),
    [
        (figures(0.003, 0.012), [figures(0.003, 0.012)], "lossless"),
        (figures(0.003, 0.012), [figures(0.001, 0.01), figures(0.0031, 0.01)], "near-lossless"),
        (figures(0.003, 0.012), [figures(0.003, 0.013)], "near-lossless"),
        (figures(0.003, 0.012), [figures(0.003, 0.012, 0.98)], "good"),
        (figures(0.003, 0.012), [figures(0.003, 0.012, None)], "lossless"),
        (figures(0.003, 0.013), [], "near-lossless"),
        (figures(0.01, 0.1, 0.99), [], "near-lossless"),
        (figures(0.01, 0.101, 0.99), [], "good"),
        (figures(0.002, 0.01, 0.98), [], "good"),
        (figures(0.03, 9.0, 0.97), [], "good"),
        (figures(0.03, 9.0, 0.97), [figures(0.031, 9.0)], "lossy"),
        (figures(0.002, 0.01, 0.96), [], "lossy"),
        (figures(0.002, 0.01, None), [], "lossless"),
    ],
)
def test_a_grade_needs_all_its_conditions(load: Any, found: dict[str, Any], turns: list[Any], word: str) -> None:
    assert load("_grades").grade(found, figures(0.0015, 0.006), turns) == word


def test_the_floor_itself_is_lossless_in_its_worst_turn_too(load: Any) -> None:
    floor, turns = figures(0.0015, 0.006), [figures(0.001, 0.01), figures(0.004, 0.005)]
    assert load("_grades").grade(floor, floor, turns, turns) == "lossless"


def test_mass_kept_is_that_of_chosen_positions_and_the_turns_own(load: Any) -> None:
    weights = torch.tensor([[[0.1, 0.2, 0.3, 0.15, 0.25]], [[0.5, 0.1, 0.1, 0.1, 0.2]]])
    chosen = Taken(torch.tensor([[0, 2], [1, -1]]), None, None, "exact", 0)
    kept = load("_probe").mass_kept(weights, 3, chosen)
    assert torch.allclose(kept, torch.tensor([[0.8], [0.4]]))
    assert torch.allclose(load("_probe").mass_kept(weights, 3, None), torch.ones(2, 1))


def test_the_worst_hundredth_is_a_mean_of_the_lowest(load: Any) -> None:
    assert load("_probe").worst_hundredth(torch.arange(300.0)) == 1.0
    assert load("_probe").worst_hundredth(torch.tensor([3.0, 2.0])) == 2.0


def test_hot_bytes_are_index_and_resident_kv(load: Any) -> None:
    shape, prior = SimpleNamespace(bytes_per_token=100, n_layers=4), SimpleNamespace(nbytes=40)
    cache = SimpleNamespace(length=10, shape=shape, prior=prior)
    plain, scored = (SimpleNamespace(nbytes=7, policy=parse(name, {})) for name in ("sieve", "kvzip"))
    hot_bytes = load("_replay").hot_bytes
    assert hot_bytes(cache, plain, offloaded=False) == 1007
    assert hot_bytes(cache, plain, offloaded=True) == 257
    assert hot_bytes(cache, scored, offloaded=True) == 297  # it shares its KV with policies that want no prior
    cache.prior = None
    assert hot_bytes(cache, scored, offloaded=True) == 257


@pytest.mark.parametrize(
    ("form", "exact", "kv_rows"), [(False, 0, 2 * (5 + 1)), (True, 0, 2 * (5 + 1) - 4), (True, 1, 2 * (5 + 1) - 2)]
)
def test_what_is_read_exactly_beside_a_form_counts(load: Any, form: bool, exact: int, kv_rows: int) -> None:
    """Two heads chose three and one of four earlier positions, and have a token of their own."""
    at = torch.tensor([[0, 1, 3], [2, -1, -1]])
    keys = torch.zeros(2, 5, 8)
    taken = Taken(at, torch.zeros(2, 3, 8) if form else None, None, "a form", 0, exact)
    probe = load("_probe").Probe()
    probe._count_bytes(keys, 4, taken, None, 0)
    assert probe.kv_bytes == kv_rows * 8 * 4


def test_an_answers_first_token_is_not_scored(load: Any) -> None:
    """It follows the prompt, which attended to everything."""
    fidelity, model = load("fidelity"), make_pair("llama").ours
    policies = {"random": load("_references").Random(16), "snapkv": parse("snapkv", {"budget": 16})}
    replay = fidelity.Replay(model, lambda text: [1, 2, 3], policies, 200, 2, 12)
    replay.conversation(random_ids(212, 1))
    told = {name: result.told() for name, result in replay.results.items()}
    told["chunking"] = replay.floor.told()
    assert [one["n"] for one in told.values()] == [11, 11, 11]
    assert [turn["n"] for turn in told["snapkv"]["by_depth"]] == [7, 11]
    assert min(replay.results["snapkv"].last.kl) > 0


def lived(load: Any, policy: Any) -> list[torch.Tensor]:
    """A conversation of two turns with its own answers."""
    chat = SimpleNamespace(ids=lambda text: [len(text) % 200], reply="r")
    turn = load("_dialogue").Turn
    ids = random_ids(358, 5)
    turns = [turn(ids[:300], ids[300:320], ids[320:324], ids[324:326], "first", stem=ids[326:328])]
    turns.append(turn([], ids[330:350], ids[350:354], ids[354:356], "first", stem=ids[356:358]))
    conversation = load("_dialogue").Conversation("T", turns)
    with torch.inference_mode():
        found: list[torch.Tensor] = load("_own_history").live(make_pair("llama").ours, chat, conversation, policy)
    return found


def test_a_method_that_wants_scores_has_them_with_its_own_answers_too(load: Any) -> None:
    full = lived(load, Full())
    assert [rows.shape[0] for rows in full] == [4, 4]
    for rows, others in zip(full, lived(load, parse("kvzip", {"share": 0.1})), strict=True):
        assert not torch.equal(rows, others)


def test_a_method_that_fails_with_its_own_answers_gives_no_figure(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it fails behind all that is scored."""
    from sessiond.policies.window import WindowSelector

    step, closing = WindowSelector.step, 300 + 20 + 2 + 4  # where the first turn's closing begins

    def broken(self: Any, view: Any) -> Any:
        if view.start == closing:
            raise ZeroDivisionError("a policy's own")
        return step(self, view)

    monkeypatch.setattr(WindowSelector, "step", broken)
    with pytest.raises(ZeroDivisionError):
        lived(load, parse("window", {}))


def test_methods_that_choose_by_the_prefills_queries_are_no_contenders(load: Any) -> None:
    names = load("_contenders").contenders(96, 0.06, make_pair("llama").ours.facts)
    assert {"sieve", "snapkv", "kvzip"} <= names.keys()
    assert not {"h2o", "snapkv_once"} & names.keys()


def exact_after(load: Any, name: str) -> dict[str, Any]:
    script = load("exact_after_policy")

    def session() -> Any:
        return script.Session(make_pair("llama").ours, DETOKENIZER, lambda text: [len(text) % 200])

    policy, ids = parse(name, script.SMALL.get(name, {})), random_ids(390, 7)
    turns = [(part, policy) for part in (ids[:300], ids[300:350], ids[350:])]  # the second answer is in a whole cell
    with torch.inference_mode():
        found: dict[str, Any] = script.is_exact(session, turns)
    return found


@pytest.mark.parametrize("name", ["full", "sieve", "kvzip"])
def test_sealing_is_compared_with_full_attention_throughout(load: Any, name: str) -> None:
    found = exact_after(load, name)
    assert found == {"exact": True, "was_another": name != "full", "cells": 3}
    assert load("exact_after_policy").unproven({name: found}, [name]) == []


def test_a_policy_that_changed_nothing_proves_nothing(load: Any) -> None:
    told = {name: {"was_another": False} for name in ("full", "auto", "sieve")} | {"quest": {"was_another": True}}
    assert load("exact_after_policy").unproven(told, list(told)) == ["sieve"]


def a_turn(load: Any, kind: str = "first") -> Any:
    return load("_dialogue").Turn([], [9], [2, 1], [], kind, 0, [2, 0])


def test_a_score_tells_choice_and_exact_match_apart(load: Any) -> None:
    reference = torch.tensor([[0.0, 0.0, 5.0], [0.0, 5.0, 0.0]])
    swayed = torch.tensor([[1.0, 6.0, 2.0], [0.0, 5.0, 0.0]])  # the first token is none of the choices
    found = load("_scores").score(a_turn(load), swayed, reference, 0, 0)
    assert (found.right, found.exact, found.match) == (True, False, 0.5)
    same = load("_scores").score(a_turn(load), reference, reference, 0, 0)
    assert (same.right, same.exact, same.kl) == (True, True, 0.0)
    assert found.nll > same.nll
    assert found.kl > 0
    assert (found.top1, same.top1) == ((2.0, 1.0), (2.0, 2.0))


def test_names_never_seen_have_no_right_answer(load: Any) -> None:
    logits = torch.zeros(2, 3)
    assert load("_scores").score(a_turn(load, "new"), logits, logits, 0, 0).right is None


def test_a_summary_pairs_with_full_history_and_sets_repeats_apart(load: Any) -> None:
    scores = load("_scores")

    def one(conversation: int, turn: int, kind: str, right: bool, nll: float) -> Any:
        return scores.Score(conversation, turn, kind, 0, nll, nll, right, float(right), int(right), right)

    full = [one(c, t, k, True, 0.0) for c in range(2) for t, k in enumerate(("first", "first", "again"))]
    method = [
        one(c, t, k, k == "again" or t == 0, float(t))
        for c in range(2)
        for t, k in enumerate(("first", "first", "again"))
    ]
    found = scores.summary(full, method)
    assert (found["retention"], found["retention_again"], found["lost"]) == (0.5, 1.0, 2)
    assert (found["delta_nll"], found["kl_slope"]) == (1.0, 1.0)
    assert found["kl_by_turn"] == [0.0, 1.0, 2.0]
    assert found["delta_nll_95"] == [1.0, 1.0]


def test_accuracy_is_quoted_only_where_full_history_has_it(load: Any) -> None:
    scores = load("_scores")
    three = [scores.Score(0, 0, "first", 0, 0.0, 0.0, right, 0.0, 1, right) for right in (True, True, False)]
    assert scores.quotable(three)
    assert not scores.quotable(three[1:])
    assert not scores.quotable([])


def test_turns_stand_evenly_up_to_the_context(load: Any) -> None:
    fidelity = load("fidelity")
    assert fidelity.depths(3000, 3) == [968, 1968, 2968]
    assert fidelity.depths(4096, 1) == [4096 - fidelity.PROMPT]


def test_unknown_tasks_and_policies_are_refused(load: Any) -> None:
    with pytest.raises(ValueError, match="T9"):
        load("tasks").counts("T1,T9", 1)
    with pytest.raises(ValueError, match="nope"):
        load("_contenders").only({}, "nope")


def test_a_task_that_random_passes_is_called_too_easy(load: Any) -> None:
    told = {"full": {"right": 0.9}, "random": {"retention": 0.95}, "window": {"retention": 0.2}}
    easy, failed = load("tasks").remarks("T1", told, accuracy=True)
    assert "too easy" in easy
    assert "fails" in failed


def test_pictures_are_png(load: Any, tmp_path: Path) -> None:
    plots = load("_plots")
    one = {"kl_mean": 0.1, "kv_bytes_per_step": 50, "scan_bytes_per_step": 25, "mass_mean": 0.9}
    told = {
        "sieve": {**one, "by_depth": [{"depth": 100, "kl_mean": 0.1}, {"depth": 200, "kl_mean": 0.2}]},
        "chunking": {"kl_mean": 0.01},
    }
    files = [
        plots.quality_against_bytes(told, 1000, tmp_path / "new"),
        plots.quality_against_depth(told, tmp_path),
        plots.quality_against_turn({"full": {"kl_by_turn": [0.0]}, "sieve": {"kl_by_turn": [0.1, 0.2]}}, tmp_path),
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert plots.read_bytes(one) == 75


def test_a_peer_is_asked_the_same_questions(load: Any, tasks: ModuleType) -> None:
    rows, conversation = load("_kvpress_rows"), tasks.late_need(a_chat(load))
    asked = rows.questions([conversation, conversation])
    assert len(asked) == 2 * len(conversation.turns)
    for (before, answer), text in zip(texts(conversation), asked, strict=False):
        assert Letters().decode(text["ids"][: text["n_context"]]) == before
        assert Letters().decode(text["ids"][text["n_context"] :]) == answer
    gold = [{"nll": 0.5, "kl": 0.0, "exact": True, "match": 1.0, "choice": text["choices"][0]} for text in asked]
    assert all(score.right for score in rows.scores([conversation, conversation], gold))
