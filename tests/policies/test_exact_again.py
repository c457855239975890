"""Whatever policies ran over ten turns, the sealed KV is that of full attention over the same tokens, byte for byte."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from engine_harness import CELL, Session, digest, make_pair, random_ids
from kernel_marks import needs_build
from small_policies import SMALL

from sessiond.policies.base import Situation
from sessiond.policies.probing import Instruction
from sessiond.policies.registry import POLICIES, parse
from sessiond.policies.window import WindowSelector
from sessiond.zipping import score

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS = (40, 63, 127, 128, 129, 5, 37, 90, 1, 16)
ANSWER = 4
INSTRUCTION = Instruction(random_ids(9, 91), random_ids(7, 92), random_ids(3, 93))


@pytest.fixture(
    params=[
        pytest.param(("llama", torch.bfloat16), id="bf16"),
        pytest.param(("llama-kernels", torch.bfloat16), id="kernels", marks=needs_build),
        pytest.param(("gemma3-kernels", torch.bfloat16), id="windowed", marks=needs_build),
    ]
)
def model(request):
    return make_pair(*request.param).ours


def converse(session: Session, turns: list[tuple[str, Mapping[str, Any]]]) -> None:
    for i, (name, knobs) in enumerate(turns):
        ids = random_ids(INPUTS[i % len(INPUTS)], i)
        policy, _ = parse(name, knobs).settle_on(Situation(len(session.log), 0.0))
        session.run(ids, ANSWER, policy=policy, turn_start=len(session.log))
        if policy.wants_prior:
            score(session.model, session.cache, session.log, INSTRUCTION)


def sealed_by_full(model, log: list[int]) -> list[str]:
    other = Session(model, log=list(log))
    other.seal()
    return other.cell_digests()


def test_every_policy_has_small_knobs_here():
    assert SMALL.keys() == POLICIES.keys()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_ten_turns_under_one_policy_seal_to_the_bytes_of_full(model, name):
    session = Session(model)
    converse(session, [(name, SMALL[name])] * len(INPUTS))
    session.seal()
    assert session.cell_digests() == sealed_by_full(model, session.log)


@pytest.mark.parametrize("seed", range(3))
def test_so_does_any_sequence_of_policies(model, seed):
    draw = random.Random(seed)
    session = Session(model)
    for name in [draw.choice(sorted(SMALL)) for _ in INPUTS]:
        converse(session, [(name, SMALL[name])])
        if draw.random() < 0.3:
            session.seal()
    session.seal()
    assert session.cell_digests() == sealed_by_full(model, session.log)


def test_before_it_is_sealed_kv_computed_under_a_window_is_another():
    """Otherwise the tests above prove nothing."""
    model = make_pair("llama", torch.bfloat16).ours
    session = Session(model)
    converse(session, [("window", SMALL["window"])] * 4)
    assert session.cache.sealed == 0
    whole = len(session.log) // CELL * CELL
    before = [digest(session.cache, start, start + CELL) for start in range(0, whole, CELL)]
    session.seal()
    assert before != session.cell_digests()


def test_a_policy_that_raises_is_not_asked_again_and_the_turn_ends_as_under_full(model, monkeypatch):
    asked = []

    def broken(self, view):
        asked.append(view.start)
        raise RuntimeError("no answer")

    monkeypatch.setattr(WindowSelector, "step", broken)
    monkeypatch.setattr(WindowSelector, "prompt", lambda self, view: None)
    session, other = Session(model), Session(model)
    for one, name in ((session, "window"), (other, "full")):
        converse(one, [("full", {}), (name, SMALL[name])])
    assert session.log == other.log
    assert isinstance(session.cache.selection.failure, RuntimeError)
    assert len(asked) == 1


class Asked:
    """What a window's selector was asked: (first query, number of queries, earlier positions, those chosen)."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple[str, int, int, int, int]] = []
        for hook in ("prompt", "step"):
            real = getattr(WindowSelector, hook)

            def asked(selector, view, hook=hook, real=real):
                chosen = real(selector, view)
                self.calls.append((hook, view.start, view.query.shape[1], view.turn_start, chosen.shape[1]))
                return chosen

            monkeypatch.setattr(WindowSelector, hook, asked)


def test_a_turns_prompt_is_chosen_for_with_the_answers_last_token_that_was_never_fed(monkeypatch):
    model = make_pair("llama").ours
    session, asked = Session(model), Asked(monkeypatch)
    converse(session, [("full", {}), ("window", SMALL["window"])])
    history = INPUTS[0] + ANSWER
    layers = model.shape.n_layers
    prompts = [call for call in asked.calls if call[0] == "prompt"]
    chosen = 2 + 23  # the 24th recent one of the first query is itself
    assert prompts == [("prompt", history - 1, INPUTS[1] + 1, history - 1, chosen)] * layers
    steps = [call for call in asked.calls if call[0] == "step"]
    assert len(steps) == (ANSWER - 1) * layers


def test_history_that_was_lost_is_computed_with_full_attention_first(monkeypatch):
    model = make_pair("llama").ours
    session = Session(model)
    converse(session, [("full", {})])
    session.cache = model.new_cache()
    asked = Asked(monkeypatch)
    ids = random_ids(INPUTS[1], 1)
    session.run(ids, ANSWER, policy=parse("window", SMALL["window"]), turn_start=len(session.log))
    history = INPUTS[0] + ANSWER
    assert {call[1:4] for call in asked.calls if call[0] == "prompt"} == {(history, INPUTS[1], history)}


def chosen_in_a_step(session: Session) -> list[torch.Tensor | None]:
    """What each layer's selector answers for a token of the answer, with queries drawn anew."""
    cache, model = session.cache, session.model
    draw = torch.Generator().manual_seed(1)
    n_heads = model.config.num_attention_heads
    out = []
    for layer in range(model.shape.n_layers):
        query = torch.randn(n_heads, 1, model.shape.head_dim, generator=draw).to(cache.keys[layer].dtype)
        position, keys, values = cache.length - 1, cache.keys[layer], cache.values[layer]
        taken = cache.selection.choose(layer, query, keys, values, position, 0.2, model.rope, decoding=True)
        out.append(None if taken is None else taken.positions)
    assert cache.selection.failure is None
    return out


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_what_was_learned_from_queries_outlives_sealing(name):
    session = Session(make_pair("llama").ours)
    converse(session, [(name, SMALL[name])] * 3)
    before = session.cache.selection
    session.seal()
    assert session.cache.sealed > 0
    assert session.cache.selection is before
    assert all(chosen is not None for chosen in chosen_in_a_step(session))


@pytest.mark.parametrize("name", ["quest", "sieve", "shadowkv"])
def test_copies_of_keys_are_made_again_when_those_are_sealed(name):
    """As if the policy had come only afterwards. The window's KV is far from the sealed one."""
    session = Session(make_pair("llama").ours)
    converse(session, [("window", SMALL["window"])] * 3)
    session.cache.use(parse(name, SMALL[name]), len(session.log) - 5)
    stale = chosen_in_a_step(session)
    session.seal()
    after = chosen_in_a_step(session)
    session.cache.selection = None
    session.cache.use(parse(name, SMALL[name]), len(session.log) - 5)
    fresh = chosen_in_a_step(session)
    assert all(torch.equal(one, other) for one, other in zip(after, fresh, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(stale, fresh, strict=True))


@pytest.mark.parametrize(
    "answer",
    [
        torch.tensor([[0, 10_000]]).expand(2, -1),
        torch.tensor([[0, 44]]).expand(2, -1),
        torch.tensor([[-2, 3]]).expand(2, -1),
        torch.tensor([[0, 3]]),
        torch.zeros(2, 3),
    ],
    ids=["beyond memory", "the turn's own", "before the first", "of one head", "no positions"],
)
def test_an_answer_that_is_none_ends_no_step(monkeypatch, answer):
    """44 tokens of history, the last of which goes with the prompt; two key/value heads."""
    monkeypatch.setattr(WindowSelector, "step", lambda self, view: answer)
    session = Session(make_pair("qwen3").ours)
    assert session.model.shape.n_kv_heads == 2
    converse(session, [("full", {}), ("window", SMALL["window"])])
    assert isinstance(session.cache.selection.failure, ValueError)


def test_a_first_prompt_is_sealed_at_once_whatever_the_policy(model):
    session = Session(model)
    session.run(random_ids(2 * CELL + 5, 1), ANSWER, policy=parse("window", SMALL["window"]), turn_start=0)
    assert session.cache.sealed == 2 * CELL


def test_cells_that_come_over_provisional_kv_renew_what_was_copied_of_it():
    """As restoring does: the cache is told before the bytes change."""
    session = Session(make_pair("llama").ours)
    converse(session, [("quest", SMALL["quest"])] * 2)
    chosen_in_a_step(session)
    seen = []
    for selector in session.cache.selection._selectors:
        selector.renew = seen.append
    session.cache.about_to_change(3)
    assert seen == [3] * session.model.shape.n_layers
