"""A forward that rests between two layers comes to the same bits, whatever runs meanwhile; given up, it leaves a cache
as clean as before."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from engine_harness import CELL, Session, drain, ended, make_pair, random_ids, step_until, tokens_of
from kernel_marks import needs_build
from resting_steps import RestingSteps
from test_zipping import filled, scored, state, work_of

from sessiond.model import Model
from sessiond.scheduler import Scheduler
from sessiond.stepevents import CellSealed, Ended

pytestmark = [needs_build, pytest.mark.usefixtures("one_thread")]

N_LAYERS = 3


@pytest.fixture
def model() -> Model:
    return make_pair("llama-kernels", torch.bfloat16).ours


@pytest.fixture
def steps(model, monkeypatch) -> RestingSteps:
    steps = RestingSteps(model)
    monkeypatch.setattr(model, "begin", steps)
    return steps


class Urgent:
    """Somebody waits for the engine whenever this says so."""

    def __init__(self, now: bool = False) -> None:
        self.now = now

    def __call__(self) -> bool:
        return self.now


def decoding(model: Model, n_tokens: int = 200, **options) -> tuple[Session, Scheduler]:
    """A session that decodes, in a scheduler where a prefill advances by one layer at a time beside it."""
    session, scheduler = Session(model, "decoding"), Scheduler(model, CELL, **({"prefill_share": 0.0} | options))
    scheduler.add(session.turn(random_ids(20, 9), n_tokens))
    scheduler.step()
    assert scheduler.decoding
    return session, scheduler


# --- prompts -------------------------------------------------------------------------------------------------------


def test_every_layer_of_a_piece_is_followed_by_a_token_of_those_that_decode(model, steps):
    alone, beside = Session(model, "alone"), Session(model, "late")
    expected = alone.run(random_ids(300, 1), 5)
    expected_others = Session(model).run(random_ids(20, 9), 40)
    _, scheduler = decoding(model, 40)
    scheduler.add(beside.turn(random_ids(300, 1), 5))
    events = []
    for piece in range(3):
        for layer in range(N_LAYERS):
            assert beside.cache.length == CELL * piece
            fresh = scheduler.step()
            events += fresh
            assert len(tokens_of(fresh, "decoding")) == 1, (piece, layer)
    assert beside.cache.sealed == 2 * CELL
    events += drain(scheduler)
    assert tokens_of(events, "late") == expected
    assert tokens_of(events, "decoding") == expected_others[1:]
    assert beside.cell_digests() == alone.cell_digests()
    assert torch.equal(beside.sampler.rows[0], alone.sampler.rows[0])


@pytest.mark.parametrize(("share", "rests"), [(0.0, 2), (1.0, 2), (2.0, 1), (3.0, 0), (math.inf, 0)])
def test_a_piece_advances_for_its_share_of_recent_decode_steps(model, steps, share, rests):
    """The clock ticks when it is looked at: a decode step takes a tick, and so does a layer."""
    ticks = itertools.count()
    _, scheduler = decoding(model, prefill_share=share, clock=lambda: float(next(ticks)))
    scheduler.step()
    scheduler.add(Session(model, "late").turn(random_ids(CELL, 1), 5))
    late = len(steps.begun)
    step_until(scheduler, lambda event: tokens_of([event], "late"))
    assert [step.rests for step in steps.begun[late:]] == [rests]


def test_without_turns_that_decode_a_piece_runs_through(model, steps):
    Session(model).run(random_ids(300, 1), 5)
    assert len(steps.begun) == 3
    assert steps.rests == 0


def test_who_waits_for_the_engine_waits_for_a_layer_of_a_piece(model, steps):
    urgent = Urgent(now=True)
    session, scheduler = Session(model), Scheduler(model, CELL, gives_way=urgent)
    scheduler.add(session.turn(random_ids(CELL, 1), 1))
    assert scheduler.step() == []
    assert session.cache.length == 0
    assert scheduler.cancel("s") == [Ended("s", "aborted")]
    assert scheduler.idle


@pytest.mark.parametrize("how", ["cancelled", "broken"])
def test_a_turn_that_ends_in_the_middle_of_a_piece_leaves_a_clean_cache(model, steps, monkeypatch, how):
    """Its cache, and everybody else's tokens: it can go on as if the piece had never begun."""
    ids = random_ids(300, 1)
    expected, expected_others = Session(model).run(ids, 5), Session(model).run(random_ids(20, 9), 40)
    _, scheduler = decoding(model, 40)
    late = Session(model, "late")
    scheduler.add(late.turn(ids, 5))
    events = [event for _ in range(N_LAYERS + 1) for event in scheduler.step()]
    assert (late.cache.length, late.cache.sealed) == (CELL, CELL), "the second piece has begun"
    if how == "cancelled":
        events += scheduler.cancel("late")
    else:

        def broken(enough):
            raise RuntimeError("the step broke")

        monkeypatch.setattr(steps.begun[-1], "advance", broken)
        events += scheduler.step()
        assert str(ended(events)["late"].error) == "the step broke"
    assert (late.cache.length, late.cache.sealed) == (CELL, CELL)
    assert not scheduler.prefilling
    events += scheduler.step()
    scheduler.add(late.turn([], 5))
    events += drain(scheduler)
    assert tokens_of(events, "late") == expected
    assert tokens_of(events, "decoding") == expected_others[1:]


# --- what waits for turns ------------------------------------------------------------------------------------------


def sealing(model: Model, urgent: Urgent) -> tuple[Session, Scheduler]:
    """A session whose first cell is being sealed, and rests in the middle of it."""
    session, scheduler = Session(model, "done"), Scheduler(model, CELL, gives_way=urgent)
    session.run(random_ids(300, 1), 1, seal=False)
    session.log = session.log[:300]
    urgent.now = True
    scheduler.sealing.append(session.seal_work())
    assert scheduler.step() == []
    assert session.cache.sealed == 0
    return session, scheduler


def test_sealing_rests_while_turns_run_and_goes_on_where_it_was(model, steps):
    whole = Session(model)
    whole.run(random_ids(300, 1), 1)
    session, scheduler = sealing(model, Urgent())
    begun = len(steps.begun)
    scheduler.add(Session(model, "late").turn(random_ids(20, 2), 5))
    events = step_until(scheduler, lambda event: isinstance(event, Ended))
    assert not any(isinstance(event, CellSealed) for event in events)
    scheduler.gives_way = None
    assert drain(scheduler) == [CellSealed("done", 0), CellSealed("done", 1), CellSealed("done", -1)]
    assert session.cell_digests() == whole.cell_digests()
    assert len(steps.begun) == begun + 2, "the late turn's prompt, and the second cell"


def test_sealing_that_always_gives_way_still_comes_to_its_end(model, steps):
    whole = Session(model)
    whole.run(random_ids(300, 1), 1)
    session, scheduler = sealing(model, Urgent())
    drain(scheduler)
    assert session.cell_digests() == whole.cell_digests()
    assert steps.rests >= 2 * (N_LAYERS - 1)


def test_sealing_that_rests_is_taken_out(model, steps):
    session, scheduler = sealing(model, Urgent())
    scheduler.cancel_idle("done")
    assert scheduler.idle
    assert scheduler.step() == []
    assert (session.cache.sealed, session.cache.length) == (0, 300)
    session.seal()
    assert session.cache.sealed == 2 * CELL


def test_a_turn_of_the_session_itself_gives_the_cell_up(model, steps):
    ids = random_ids(400, 3)
    expected = Session(model, log=random_ids(300, 1)).run(ids, 5)
    session, scheduler = sealing(model, Urgent())
    scheduler.add(session.turn(ids, 5))
    events = step_until(scheduler, lambda event: isinstance(event, Ended))
    assert tokens_of(events, "done") == expected
    assert session.cache.sealed == 5 * CELL


def test_scoring_that_rests_again_and_again_comes_to_the_same_scores(model, steps):
    session, plain = filled(model, 330), filled(model, 330)
    expected = scored(plain, 100).scores
    scheduler = Scheduler(model, CELL, gives_way=Urgent(now=True))
    scheduler.scoring.append(work_of(session, 100))
    drain(scheduler)
    assert steps.rests == 8, "four pieces, three layers each"
    assert torch.equal(session.cache.prior.scores, expected)
    assert state(session.cache) == state(plain.cache)


def test_scoring_that_rests_is_taken_out_and_leaves_no_trace(model, steps):
    session = filled(model, 330)
    scheduler, before = Scheduler(model, CELL, gives_way=Urgent(now=True)), state(session.cache)
    scheduler.scoring.append(work_of(session, 100))
    scheduler.step()
    assert state(session.cache) != before
    scheduler.cancel_idle(session.name)
    assert scheduler.idle
    assert state(session.cache) == before
    assert session.cache.prior is None
