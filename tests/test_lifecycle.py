"""A session's states: the table is what the drawing says, and nothing in it is without use."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sessiond.lifecycle import TRANSITIONS, Event, State, advance

PACKAGE = Path(__file__).resolve().parents[1] / "sessiond"


def test_a_session_may_live_the_life_it_was_made_for():
    state = State.COLD
    for event, expected in (
        (Event.WARM, State.HOT),
        (Event.SUSPEND, State.COLD),
        (Event.DELETE, State.DELETED),
        (Event.UNDELETE, State.COLD),
        (Event.WARM, State.HOT),
    ):
        state = advance(state, event)
        assert state is expected


@pytest.mark.parametrize(
    ("state", "event"), [(s, e) for s in State for e in Event if (s, e) not in TRANSITIONS], ids=str
)
def test_what_the_table_does_not_know_is_a_bug(state: State, event: Event):
    with pytest.raises(AssertionError):
        advance(state, event)


def test_memory_is_left_before_a_session_is_deleted():
    assert {state for state, event in TRANSITIONS if event is Event.DELETE} == {State.COLD}


def test_a_deleted_session_is_not_warmed():
    assert {event for state, event in TRANSITIONS if state is State.DELETED} == {Event.UNDELETE}


def test_every_state_can_be_left_and_reached():
    assert set(TRANSITIONS.values()) == {state for state, _ in TRANSITIONS} == set(State)


def test_the_daemon_causes_every_event():
    caused = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".advance") and node.args:
                caused.add(ast.unparse(node.args[0]).rpartition(".")[2])
    caused = {name for name in caused if name.isupper()}  # a forward advances as well
    assert caused == {event.name for event in Event}
