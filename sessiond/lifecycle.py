"""Where a session is while this process knows it, as a transition table.

COLD --warm--> HOT --suspend--> COLD --delete--> DELETED --undelete--> COLD

A turn is no state: it holds the session's lease, and whoever moves the session takes that first. A purged session is
known no more.
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    COLD = "cold"  # only on disk
    HOT = "hot"  # attention can run now
    DELETED = "deleted"  # kept until purge_time


class Event(enum.StrEnum):
    WARM = "warm"
    SUSPEND = "suspend"
    DELETE = "delete"
    UNDELETE = "undelete"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.COLD, Event.WARM): State.HOT,
    (State.HOT, Event.SUSPEND): State.COLD,
    (State.COLD, Event.DELETE): State.DELETED,
    (State.DELETED, Event.UNDELETE): State.COLD,
}


def advance(state: State, event: Event) -> State:
    """The state after `event`. A transition not in the table is a bug of the caller."""
    after = TRANSITIONS.get((state, event))
    assert after is not None, f"no transition from {state} by {event}"
    return after
