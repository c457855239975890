"""The engine's thread: what is under way when it is to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from engine_harness import CELL, Session, make_pair, random_ids
from kernel_marks import needs_build
from resting_steps import RestingSteps
from step_hooks import StepHook

from sessiond.engine import Engine
from sessiond.model import Model

pytestmark = [needs_build, pytest.mark.usefixtures("one_thread")]

PATIENCE = 30.0  # seconds


@pytest.fixture
def model() -> Model:
    return make_pair("llama-kernels", torch.bfloat16).ours


@pytest.fixture
def steps(model, monkeypatch) -> RestingSteps:
    steps = RestingSteps(model)
    monkeypatch.setattr(model, "begin", steps)
    return steps


def stopped_in_the_first_forward(model: Model, work: Callable[[Engine], None]) -> None:
    """Start an engine, give it `work`, and stop it while the first forward of that waits before its first layer."""
    engine = Engine(model, CELL, 1, lambda events: None)
    engine.start().result(PATIENCE)
    began = threading.Event()

    def wait_for_the_stop(feeds) -> None:
        began.set()
        until = time.monotonic() + PATIENCE
        while engine._inbox.empty() and time.monotonic() < until:
            time.sleep(0.001)

    hook = StepHook(model, wait_for_the_stop)
    try:
        work(engine)
        assert began.wait(PATIENCE)
        engine.stop()
    finally:
        hook.remove()


def test_a_stop_waits_for_a_layer_of_a_piece_and_leaves_a_clean_cache(model, steps):
    session, ids = Session(model), random_ids(300, 1)
    expected = Session(model).run(ids, 5)
    stopped_in_the_first_forward(model, lambda engine: engine.submit(session.turn(ids, 5)))
    assert steps.begun[-1].rests == 1
    assert (session.cache.length, session.cache.sealed) == (0, 0)
    session.log.clear()
    assert session.run(ids, 5) == expected


def test_a_stop_waits_for_a_layer_of_a_cell_that_is_sealed(model, steps):
    session = Session(model)
    session.run(random_ids(300, 1), 1, seal=False)
    stopped_in_the_first_forward(model, lambda engine: engine.seal(session.seal_work()))
    assert steps.begun[-1].rests == 1
    assert session.cache.sealed == 0
    session.seal()
    assert session.cache.sealed == 2 * CELL
