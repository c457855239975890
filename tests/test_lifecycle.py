"""A session's states: the table is what the drawing says, and walks of it end where they should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.lifecycle import TRANSITIONS, Event, State, advance


def test_a_session_may_live_the_life_it_was_made_for():
    state = State.COLD
    for event, expected in (
        (Event.WARM, State.HOT),
        (Event.LEASE, State.RUNNING),
        (Event.RELEASE, State.HOT),
        (Event.SUSPEND, State.COLD),
        (Event.DELETE, State.DELETED),
        (Event.UNDELETE, State.COLD),
        (Event.DELETE, State.DELETED),
        (Event.PURGE, State.PURGED),
    ):
        state = advance(state, event)
        assert state is expected


@pytest.mark.parametrize(
    ("state", "event"), [(s, e) for s in State for e in Event if (s, e) not in TRANSITIONS], ids=str
)
def test_what_the_table_does_not_know_is_a_bug(state: State, event: Event):
    with pytest.raises(AssertionError):
        advance(state, event)


def test_nothing_happens_after_the_purge():
    assert not any(state is State.PURGED for state, _ in TRANSITIONS)


def test_a_running_turn_is_neither_pushed_out_nor_deleted():
    assert {event for state, event in TRANSITIONS if state is State.RUNNING} == {Event.RELEASE}


def test_only_a_hot_session_can_run():
    assert {state for (state, _), after in TRANSITIONS.items() if after is State.RUNNING} == {State.HOT}


def test_every_state_and_event_has_a_use():
    reached = {State.COLD, *TRANSITIONS.values()}
    assert reached == set(State)
    assert {event for _, event in TRANSITIONS} == set(Event)


@given(st.lists(st.sampled_from(Event)))
def test_every_walk_can_still_be_purged(events: list[Event]):
    """Whatever happened, there is a way to get rid of a session."""
    state = State.COLD
    for event in events:
        state = TRANSITIONS.get((state, event), state)
    for event in (Event.RELEASE, Event.DELETE, Event.PURGE):
        state = TRANSITIONS.get((state, event), state)
    assert state is State.PURGED
