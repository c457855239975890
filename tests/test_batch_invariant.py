"""With a limit on the rows of a forward a decoding turn gets the same bits beside others as alone."""

from __future__ import annotations

import math

import pytest
import torch
from engine_harness import CELL, Session, StepSpy, drain, make_pair, random_ids, tokens_of, torch_threads
from kernel_marks import needs_build

from sessiond.model import Model
from sessiond.scheduler import Scheduler

N_NEW = 4


def beside(model: Model, n: int, most_rows: int | None, monkeypatch) -> tuple[list[Session], list[int]]:
    """`n` sessions that decode together, and how many turns each decode step carried."""
    spy = StepSpy(model)
    monkeypatch.setattr(model, "begin", spy)
    scheduler = Scheduler(model, CELL, most_rows=most_rows, prefill_share=math.inf)
    sessions = [Session(model, f"s{i}") for i in range(n)]
    for i, session in enumerate(sessions):
        scheduler.add(session.turn(random_ids(3 + i % 7, seed=i), N_NEW + n))
    for _ in range(n):
        scheduler.step()
    assert len(scheduler.decoding) == n
    spy.steps.clear()
    for _ in range(N_NEW):
        scheduler.step()
    return sessions, [len(feeds) for feeds in spy.steps]


def same_rows(model: Model, sessions: list[Session], monkeypatch) -> bool:
    """Whether the first, the last and those around the 64th got the logits that they get alone."""
    monkeypatch.undo()
    same = True
    for i, session in list(enumerate(sessions))[:: max(1, len(sessions) - 1)] + list(enumerate(sessions))[62:66]:
        alone = Session(model)
        alone.run(random_ids(3 + i % 7, seed=i), len(session.sampler.rows))
        same = same and all(map(torch.equal, alone.sampler.rows, session.sampler.rows))
    return same


def test_without_kernels_each_turn_has_a_forward_of_its_own(monkeypatch):
    """The control without the limit shows that the comparison sees a difference."""
    model = make_pair("llama").ours
    assert model.invariant_rows == 1
    with torch_threads(1):
        sessions, packed = beside(model, 6, None, monkeypatch)
        assert packed == [6] * N_NEW
        assert not same_rows(model, sessions, monkeypatch)
        sessions, packed = beside(model, 6, model.invariant_rows, monkeypatch)
        assert packed == [1] * 6 * N_NEW
        assert same_rows(model, sessions, monkeypatch)


@needs_build
@pytest.mark.parametrize("name", ["llama-kernels", "mistral-kernels", "gemma3-kernels"])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_compiled_layers_carry_any_number(name, n_threads, monkeypatch):
    model = make_pair(name, torch.bfloat16).ours
    assert model.invariant_rows is None
    with torch_threads(n_threads):
        sessions, packed = beside(model, 70, model.invariant_rows, monkeypatch)
        assert packed == [70] * N_NEW
        assert same_rows(model, sessions, monkeypatch)


def test_a_forward_that_breaks_ends_its_own_turns_only(monkeypatch):
    model = make_pair("llama").ours
    spy = StepSpy(model)
    monkeypatch.setattr(model, "begin", spy)
    scheduler = Scheduler(model, CELL, most_rows=2)
    sessions = [Session(model, f"s{i}") for i in range(4)]
    for i, session in enumerate(sessions):
        scheduler.add(session.turn(random_ids(5, seed=i), 12))
    for _ in range(4):
        scheduler.step()
    spy.broken.append(sessions[2].cache)
    events = scheduler.step()
    assert [len(tokens_of(events, f"s{i}")) for i in range(4)] == [1, 1, 0, 0]
    assert len(scheduler.decoding) == 2
    spy.broken.clear()
    drain(scheduler)
