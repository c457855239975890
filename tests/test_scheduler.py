"""The plan of a prefill; what runs in a step; and turns that are cancelled, resumed, or broken."""

from __future__ import annotations

import itertools

import pytest
import torch
from engine_harness import (
    CELL,
    DETOKENIZER,
    Session,
    StepSpy,
    drain,
    ended,
    make_pair,
    random_ids,
    step_until,
    tokens_of,
)
from hypothesis import given
from hypothesis import strategies as st

from sessiond.model import Model
from sessiond.sampling import SamplingParams
from sessiond.scheduler import Scheduler
from sessiond.stepevents import CellSealed, Ended, TokenOut
from sessiond.textstream import TextStream
from sessiond.turnwork import Piece, plan_prefill
from sessiond.types import FinishReason

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> Model:
    return make_pair("llama").ours


@pytest.fixture
def spy(model, monkeypatch) -> StepSpy:
    spy = StepSpy(model)
    monkeypatch.setattr(model, "begin", spy)
    return spy


# --- plan_prefill --------------------------------------------------------------------------------------------------


def canonical(start: int, end: int) -> Piece:
    return Piece(start, end, True)


def provisional(start: int, end: int) -> Piece:
    return Piece(start, end, False)


@pytest.mark.parametrize(
    ("sealed", "length", "target", "seal", "pieces"),
    [
        # nothing to do
        (0, 0, 0, True, []),
        (128, 200, 200, True, []),
        # less than a cell is new: computed as it is, even where it fills a cell
        (0, 0, 1, True, [provisional(0, 1)]),
        (0, 0, 127, True, [provisional(0, 127)]),
        (0, 100, 227, True, [provisional(100, 227)]),
        (128, 300, 301, True, [provisional(300, 301)]),
        # a cell and more is new
        (0, 0, 128, True, [canonical(0, 128)]),
        (0, 0, 129, True, [canonical(0, 128), provisional(128, 129)]),
        (0, 0, 300, True, [canonical(0, 128), canonical(128, 256), provisional(256, 300)]),
        (128, 128, 384, True, [canonical(128, 256), canonical(256, 384)]),
        # provisional positions are computed again
        (0, 100, 228, True, [canonical(0, 128), provisional(128, 228)]),
        (0, 300, 428, True, [canonical(0, 128), canonical(128, 256), canonical(256, 384), provisional(384, 428)]),
        (128, 300, 512, True, [canonical(128, 256), canonical(256, 384), canonical(384, 512)]),
        # without sealing nothing is canonical and nothing is computed twice
        (0, 0, 128, False, [provisional(0, 128)]),
        (0, 100, 300, False, [provisional(100, 128), provisional(128, 256), provisional(256, 300)]),
        (0, 100, 227, False, [provisional(100, 227)]),
    ],
)
def test_plan(sealed, length, target, seal, pieces):
    assert plan_prefill(sealed, length, target, CELL, seal) == pieces


@given(
    cell=st.sampled_from([1, 7, 128, 256]),
    n_sealed=st.integers(0, 5),
    beyond=st.integers(0, 700),
    new=st.integers(0, 700),
    seal=st.booleans(),
)
def test_any_plan(cell, n_sealed, beyond, new, seal):
    sealed = n_sealed * cell
    length = sealed + beyond
    target = length + new
    pieces = plan_prefill(sealed, length, target, cell, seal)
    if not new:
        assert pieces == []
        return
    # contiguous, none empty, ending where asked, starting at one of the two borders
    assert pieces[-1].end == target
    assert all(left.end == right.start for left, right in itertools.pairwise(pieces))
    assert all(piece.start < piece.end for piece in pieces)
    assert pieces[0].start == (sealed if seal and new >= cell else length)
    for piece in pieces:
        whole = piece.start % cell == 0 and piece.end - piece.start == cell
        if piece.canonical:
            assert whole
        if new >= cell:
            assert piece.start // cell == (piece.end - 1) // cell, "a piece lies in one cell"
            assert piece.canonical == (seal and whole)
    if new < cell:
        assert pieces == [Piece(length, target, False)]
    # canonical pieces stand on sealed cells only
    flags = [piece.canonical for piece in pieces]
    assert flags == sorted(flags, reverse=True)


# --- what runs in a step -------------------------------------------------------------------------------------------


def sizes(spy: StepSpy) -> list[list[int]]:
    """Tokens of each feed of each step so far."""
    return [[len(feed.ids) for feed in feeds] for feeds in spy.steps]


def test_a_turn_step_by_step(model, spy):
    session, scheduler = Session(model), Scheduler(model, CELL)
    scheduler.add(session.turn(random_ids(300, seed=1), 3))
    assert scheduler.step() == scheduler.step() == []
    assert (session.cache.sealed, session.cache.length) == (256, 256)
    (first,) = scheduler.step()
    assert isinstance(first, TokenOut)
    assert first.index == 0
    events = drain(scheduler)
    assert [event.index for event in events if isinstance(event, TokenOut)] == [1, 2]
    assert events[-1] == Ended("s", FinishReason.LENGTH)
    assert sizes(spy) == [[128], [128], [44], [1], [1]]
    assert (session.cache.sealed, session.cache.length) == (256, 302), "the last token was not fed"
    counters = scheduler.counters
    assert (counters.prefilled, counters.decoded, counters.steps) == (300, 3, 5)
    assert (counters.recomputed, counters.sealed) == (0, 0)


def test_positions_made_canonical_are_counted_at_the_step_that_computes_them_again(model):
    session, scheduler = Session(model), Scheduler(model, CELL)
    session.run(random_ids(200, seed=1), 5)
    assert (session.cache.sealed, session.cache.length) == (CELL, 204)
    scheduler.add(session.turn(random_ids(200, seed=2), 1))
    counts = []
    while not scheduler.idle:
        scheduler.step()
        counts.append((scheduler.counters.prefilled, scheduler.counters.recomputed))
    assert counts == [(128, 76), (256, 76), (277, 76)], "positions 128 to 204 were there; 405 are there now"


@pytest.mark.parametrize(("kv", "recomputed"), [("kept", 0), ("lost", 300 + 8)])
def test_positions_that_a_resumed_turn_had_computed_are_counted(model, kv, recomputed):
    """The last of its logged tokens had been sampled, not fed."""
    session, scheduler = Session(model), Scheduler(model, CELL)
    tokens = session.run(random_ids(300, seed=1), 9)
    assert session.cache.length == 300 + 8
    if kv == "lost":
        session = Session(model, log=session.log[:300])
    else:
        session.log = session.log[:300]
    scheduler.add(session.turn([], 12, logged=tokens))
    drain(scheduler)
    assert scheduler.counters.recomputed == recomputed
    assert scheduler.counters.decoded == 3


def test_prefills_take_turns_and_decoding_goes_on(model, spy):
    a, b, c = (Session(model, name) for name in "abc")
    scheduler = Scheduler(model, CELL)
    scheduler.add(c.turn(random_ids(3, seed=3), 50))
    scheduler.step()
    scheduler.add(a.turn(random_ids(300, seed=1), 1))
    scheduler.add(b.turn(random_ids(300, seed=2), 1))
    spy.steps.clear()
    for _ in range(4):
        assert tokens_of(scheduler.step(), "c"), "a decoding turn gets a token every step"
    assert [feeds[0].cache for feeds in spy.steps[::2]] == [a.cache, b.cache, a.cache, b.cache]
    assert all(feeds[0].cache is c.cache for feeds in spy.steps[1::2])


def test_sealing_waits_for_every_turn(model, spy):
    """Not while a turn prefills, nor decodes, nor between its pieces; then a cell a step."""
    done, busy, late = (Session(model, name) for name in ("done", "busy", "late"))
    done.run(random_ids(300, seed=1), 1, seal=False)
    scheduler = Scheduler(model, CELL)
    scheduler.sealing.append(done.seal_work())
    scheduler.add(busy.turn(random_ids(300, seed=2), 6))
    events = step_until(scheduler, lambda event: isinstance(event, Ended))
    assert not any(isinstance(event, CellSealed) for event in events)
    assert scheduler.step() == [CellSealed("done", 0)]
    # a turn that comes in between goes first
    scheduler.add(late.turn(random_ids(3, seed=2), 4))
    events = step_until(scheduler, lambda event: isinstance(event, Ended))
    assert not any(isinstance(event, CellSealed) for event in events)
    assert drain(scheduler) == [CellSealed("done", 1), CellSealed("done", -1)]
    assert (done.cache.sealed, done.cache.length) == (256, 300)
    assert scheduler.counters.sealed == 256


def test_cancel_idle_names_its_owner(model):
    a, b = Session(model, "a"), Session(model, "b")
    scheduler = Scheduler(model, CELL)
    for session in (a, b):
        session.run(random_ids(200, seed=1), 1, seal=False)
        scheduler.sealing.append(session.seal_work())
    scheduler.cancel_idle("a")
    assert drain(scheduler) == [CellSealed("b", 0), CellSealed("b", -1)]
    assert (a.cache.sealed, b.cache.sealed) == (0, 128)


@pytest.mark.parametrize(("max_context", "n_tokens"), [(64, 4), (61, 1)])
def test_the_context_is_full(model, max_context, n_tokens):
    session, scheduler = Session(model), Scheduler(model, CELL)
    scheduler.add(session.turn(random_ids(60, seed=1), 100, max_context=max_context))
    events = drain(scheduler)
    assert len(tokens_of(events, "s")) == n_tokens
    assert events[-1] == Ended("s", FinishReason.CONTEXT_FULL)
    assert session.cache.length + 1 == max_context


def test_a_stop_token_ends_the_turn(model):
    ids = random_ids(60, seed=1)
    tokens = Session(model).run(ids, 10)
    stop = tokens[4]
    session, scheduler = Session(model), Scheduler(model, CELL)
    scheduler.add(session.turn(ids, 10, stop_ids=frozenset([stop])))
    events = drain(scheduler)
    assert tokens_of(events, "s") == tokens[: tokens.index(stop) + 1]
    assert events[-1] == Ended("s", FinishReason.STOP)


# --- cancelled and resumed -----------------------------------------------------------------------------------------

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=7)


@pytest.mark.parametrize("params", [SamplingParams(repetition_penalty=1.2), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kv", ["kept", "lost"])
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 9, 15])
def test_resumed_after_some_tokens(model, params, kv, n_tokens):
    """Cancelled in the prefill (0) or the decode, then resumed with the logged tokens: as if nothing had happened,
    bit for bit, whether the KV stayed in memory or was lost."""
    ids = random_ids(300, seed=4)
    whole = Session(model)
    expected = whole.run(ids, 16, params=params)

    session, scheduler = Session(model), Scheduler(model, CELL)
    scheduler.add(session.turn(ids, 16, params=params))
    events = scheduler.step()
    while len(tokens_of(events, "s")) < n_tokens:
        events += scheduler.step()
    logged = tokens_of(events, "s")
    assert scheduler.cancel("s") == [Ended("s", FinishReason.ABORTED)]
    assert scheduler.idle
    assert session.cache.length == (len(ids) + n_tokens - 1 if n_tokens else CELL), "what was computed stays"
    before = session.sampler.rows

    if kv == "lost":
        session = Session(model, log=list(ids))
    work = session.turn([], 16, logged=logged, params=params)
    assert [out.sampled.token_id for out in work.replayed] == logged
    assert [out.index for out in work.replayed] == list(range(n_tokens))
    scheduler.add(work)
    events = drain(scheduler)
    assert logged + tokens_of(events, "s") == expected
    outs = [event for event in events if isinstance(event, TokenOut)]
    assert [out.index for out in outs] == list(range(n_tokens, 16))
    assert "".join(out.text for out in (*work.replayed, *outs)) == "".join(chr(0x100 + i) for i in expected)
    assert all(map(torch.equal, before + session.sampler.rows, whole.sampler.rows))


def test_resumed_twice_while_replaying(model):
    """A turn cancelled while it still feeds logged tokens has sampled nothing new and is resumed again."""
    ids = random_ids(40, seed=4)
    expected = Session(model).run(ids, 12)
    session, scheduler = Session(model), Scheduler(model, CELL)
    scheduler.add(session.turn(ids, 12, logged=expected[:8]))
    events = [event for _ in range(4) for event in scheduler.step()]
    assert tokens_of(events, "s") == []
    scheduler.cancel("s")
    assert session.cache.length == 40 + 3
    scheduler.add(session.turn([], 12, logged=expected[:8]))
    assert tokens_of(drain(scheduler), "s") == expected[8:]


@pytest.mark.parametrize("logged", [4, 5])
def test_text_held_for_a_stop_string_comes_with_the_last_token(model, logged):
    """Also when the turn was interrupted between its last token and its commit."""
    ids = random_ids(40, seed=4)
    tokens = Session(model).run(ids, 5)
    text = "".join(chr(0x100 + i) for i in tokens)
    stream = TextStream(DETOKENIZER, [text[-2:] + "!"])
    session, scheduler = Session(model), Scheduler(model, CELL)
    work = session.turn(ids, 5, logged=tokens[:logged], stream=stream)
    if logged == 5:
        assert work.ended_before == Ended("s", FinishReason.LENGTH)
        outs = work.replayed
    else:
        assert work.ended_before is None
        scheduler.add(work)
        outs = [*work.replayed, *(event for event in drain(scheduler) if isinstance(event, TokenOut))]
    assert [out.text for out in outs][-2:] == ["", text[-2:]]
    assert "".join(out.text for out in outs) == text


def test_cancelled_turns_leave_the_others_alone(model):
    a, b = Session(model, "a"), Session(model, "b")
    expected = Session(model).run(random_ids(40, seed=2), 12)
    scheduler = Scheduler(model, CELL)
    scheduler.add(a.turn(random_ids(500, seed=1), 12))
    scheduler.add(b.turn(random_ids(40, seed=2), 12))
    events = [event for _ in range(3) for event in scheduler.step()]
    scheduler.cancel("a")
    assert scheduler.cancel("a") == []
    assert tokens_of(events + drain(scheduler), "b") == expected


# --- broken --------------------------------------------------------------------------------------------------------


def test_a_prefill_that_raises_ends_its_turn_only(model, spy):
    bad, good = Session(model, "bad"), Session(model, "good")
    ids = random_ids(300, seed=2)
    expected = Session(model).run(ids, 8)
    scheduler = Scheduler(model, CELL)
    scheduler.add(good.turn(ids, 8))
    scheduler.add(bad.turn(random_ids(300, seed=1), 8))
    spy.broken.append(bad.cache)
    events = drain(scheduler)
    assert str(ended(events)["bad"].error) == "the step broke"
    assert ended(events)["bad"].reason is FinishReason.ABORTED
    assert ended(events)["good"].error is None
    assert tokens_of(events, "good") == expected
    # the session is as it was, and goes on
    spy.broken.clear()
    assert bad.cache.length == bad.cache.sealed == 0
    scheduler.add(bad.turn([], 8))
    assert tokens_of(drain(scheduler), "bad") == Session(model).run(bad.log, 8)


def test_a_decode_that_raises_ends_the_turns_in_it(model, spy):
    """A packed step fails as one; a turn that prefills meanwhile goes on, and all of them can be resumed."""
    a, b, c = (Session(model, name) for name in "abc")
    prompts = {"a": random_ids(50, seed=1), "b": random_ids(60, seed=2), "c": random_ids(900, seed=3)}
    expected = {name: Session(model).run(ids, 12) for name, ids in prompts.items()}
    scheduler = Scheduler(model, CELL)
    scheduler.add(a.turn(prompts["a"], 12))
    scheduler.add(b.turn(prompts["b"], 12))
    events = [event for _ in range(4) for event in scheduler.step()]
    scheduler.add(c.turn(prompts["c"], 12))
    spy.broken.append(a.cache)
    events += scheduler.step()
    assert {name: str(end.error) for name, end in ended(events).items()} == dict.fromkeys("ab", "the step broke")
    spy.broken.clear()
    for session in (a, b):
        scheduler.add(session.turn([], 12, logged=tokens_of(events, session.name)))
    events += drain(scheduler)
    for name in "abc":
        assert tokens_of(events, name) == expected[name]


def test_a_sampler_that_raises_ends_its_turn_only(model):
    a, b = Session(model, "a"), Session(model, "b")
    expected = Session(model).run(random_ids(60, seed=2), 12)
    scheduler = Scheduler(model, CELL)
    scheduler.add(a.turn(random_ids(50, seed=1), 12))
    scheduler.add(b.turn(random_ids(60, seed=2), 12))
    events = [event for _ in range(4) for event in scheduler.step()]
    assert len(scheduler.decoding) == 2

    def broken(*args):
        raise AssertionError("logits hold NaN")

    a.sampler.sample = broken
    events += drain(scheduler)
    assert str(ended(events)["a"].error) == "logits hold NaN"
    assert ended(events)["b"].error is None
    assert tokens_of(events, "b") == expected


def test_a_sampler_that_raises_on_the_first_token(model):
    session, scheduler = Session(model), Scheduler(model, CELL)
    scheduler.add(session.turn(random_ids(50, seed=1), 12))

    def broken(*args):
        raise AssertionError("logits hold NaN")

    session.sampler.sample = broken
    events = drain(scheduler)
    assert [type(event) for event in events] == [Ended]
    assert str(events[0].error) == "logits hold NaN"


def test_sealing_that_raises_ends_that_sealing_only(model, spy):
    bad, good = Session(model, "bad"), Session(model, "good")
    scheduler = Scheduler(model, CELL)
    for session in (bad, good):
        session.run(random_ids(200, seed=1), 1, seal=False)
        scheduler.sealing.append(session.seal_work())
    spy.broken.append(bad.cache)
    events = drain(scheduler)
    assert (events[0].owner, events[0].index, str(events[0].error)) == ("bad", -1, "the step broke")
    assert events[1:] == [CellSealed("good", 0), CellSealed("good", -1)]
    assert (bad.cache.sealed, bad.cache.length) == (0, 200)
    spy.broken.clear()
    bad.seal()
    assert bad.cell_digests() == good.cell_digests()
