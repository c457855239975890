"""Places for turns, and what who is refused is told."""

from __future__ import annotations

import pytest

from sessiond.errors import QueueFull
from sessiond.turnplaces import MOST_SECONDS, UNKNOWN_SECONDS, TurnPlaces


def refused(places: TurnPlaces, priority: int = 0) -> float:
    with pytest.raises(QueueFull) as error:
        places.take(priority)
    return error.value.retry_after


def test_a_place_that_is_given_back_is_free():
    places = TurnPlaces(2)
    first, _ = places.take(0), places.take(0)
    assert refused(places) == UNKNOWN_SECONDS
    places.give_back(first, ran=True)
    places.take(0)
    assert len(places) == 2


def test_turns_of_low_priority_leave_a_quarter_to_the_others():
    places = TurnPlaces(8)
    for _ in range(6):
        places.take(-1)
    refused(places, -1)
    places.take(0)
    places.take(4)
    refused(places, 4)
    assert len(places) == 8


def test_low_priority_has_a_place_where_there_is_one():
    TurnPlaces(1).take(-4)


def test_who_is_refused_is_told_how_fast_turns_end():
    """Four places, each held for 2 s: one is free every half second, and who is refused later waits longer."""
    places = TurnPlaces(4)
    held = [places.take(0) for _ in range(4)]
    for place in held[:3]:
        place.taken_at -= 2.0
        places.give_back(place, ran=True)
    for _ in range(3):
        places.take(0)
    assert [refused(places) for _ in range(3)] == pytest.approx([0.5, 1.0, 1.5], rel=0.01)
    assert places.until_free() == pytest.approx(0.5, rel=0.01), "memory is free as soon as one turn has ended"


def test_a_free_place_begins_the_count_anew():
    places = TurnPlaces(1)
    place = places.take(0)
    place.taken_at -= 4.0
    places.give_back(place, ran=True)
    place = places.take(0)
    assert [refused(places) for _ in range(2)] == pytest.approx([4.0, 8.0], rel=0.01)
    places.give_back(place, ran=False)
    places.take(0)
    assert refused(places) == pytest.approx(4.0, rel=0.01)


def test_turns_that_never_ran_do_not_count():
    places = TurnPlaces(1)
    place = places.take(0)
    place.taken_at -= 50.0
    places.give_back(place, ran=False)
    places.take(0)
    assert refused(places) == UNKNOWN_SECONDS


def test_nobody_is_told_to_wait_for_long():
    places = TurnPlaces(1)
    place = places.take(0)
    place.taken_at -= 10000.0
    places.give_back(place, ran=True)
    places.take(0)
    assert refused(places) == MOST_SECONDS


def test_recent_turns_count_most():
    places = TurnPlaces(1)
    for seconds in [10.0] * 20 + [1.0] * 20:
        place = places.take(0)
        place.taken_at -= seconds
        places.give_back(place, ran=True)
    places.take(0)
    assert 1.0 < refused(places) < 2.0
