"""A session's states as a transition table.

COLD --warm--> HOT --lease--> RUNNING --release--> HOT --suspend--> COLD
COLD, HOT --delete--> DELETED --undelete--> COLD;  DELETED --purge--> PURGED
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    COLD = "cold"  # only on disk
    HOT = "hot"  # attention can run now
    RUNNING = "running"  # a turn holds the single-writer lease
    DELETED = "deleted"  # kept until purge_time
    PURGED = "purged"  # gone


class Event(enum.StrEnum):
    WARM = "warm"
    LEASE = "lease"
    RELEASE = "release"
    SUSPEND = "suspend"
    DELETE = "delete"
    UNDELETE = "undelete"
    PURGE = "purge"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.COLD, Event.WARM): State.HOT,
    (State.HOT, Event.LEASE): State.RUNNING,
    (State.RUNNING, Event.RELEASE): State.HOT,
    (State.HOT, Event.SUSPEND): State.COLD,
    (State.COLD, Event.DELETE): State.DELETED,
    (State.HOT, Event.DELETE): State.DELETED,
    (State.DELETED, Event.UNDELETE): State.COLD,
    (State.DELETED, Event.PURGE): State.PURGED,
}


def advance(state: State, event: Event) -> State:
    """The state after `event`. A transition not in the table is a bug of the caller."""
    after = TRANSITIONS.get((state, event))
    assert after is not None, f"no transition from {state} by {event}"
    return after
