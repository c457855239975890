"""Auto settles on full attention or on sieve, by length, memory and what was missed last time."""

from __future__ import annotations

import pytest

from sessiond.cache import SessionCache
from sessiond.errors import InvalidConfig
from sessiond.policies.auto import Auto
from sessiond.policies.base import Situation
from sessiond.policies.full import Full
from sessiond.policies.sieve import Sieve
from sessiond.types import KVShape

AUTO = Auto(dense_until=4000, scarce_until=500, pressure=0.8, part=0.1, mass=0.95)


@pytest.mark.parametrize(
    ("situation", "most"),
    [
        (Situation(4000, 0.1), None),
        (Situation(4001, 0.1), 512),
        (Situation(4000, 0.79), None),
        (Situation(4000, 0.8), 512),
        (Situation(500, 0.99), None),
        (Situation(501, 0.99), 64),
        (Situation(5000, 0.1, 0.95), 512),
        (Situation(5000, 0.1, 0.9499), 1024),
        (Situation(4000, 0.1, 0.2), None),
    ],
)
def test_what_it_settles_on(situation: Situation, most: int | None):
    policy, why = AUTO.settle_on(situation)
    assert policy == (Full() if most is None else Sieve(least=64, most=most))
    assert str(situation.n_tokens) in why
    assert f"{situation.memory_used:.0%}" in why


def test_it_says_what_the_last_turn_missed():
    assert "94.0%" in AUTO.settle_on(Situation(5000, 0.1, 0.94))[1]
    assert "not measured" in AUTO.settle_on(Situation(5000, 0.1))[1]


def test_it_settles_on_the_same_while_a_session_grows_so_its_index_stays():
    assert len({AUTO.settle_on(Situation(n, 0.1))[0] for n in range(4001, 5100, 50)}) == 1
    cache = SessionCache(KVShape(1, 1, 8, "float32"), 8192)
    indexes = []
    for n in (4001, 4100, 5000):
        cache.use(AUTO.settle_on(Situation(n, 0.1))[0], n)
        indexes.append(cache.selection)
    assert indexes[0] is indexes[1] is indexes[2]


@pytest.mark.parametrize(
    ("knobs", "knob"),
    [
        ({"dense_until": 100, "scarce_until": 101}, "scarce_until"),
        ({"dense_until": -1, "scarce_until": 0}, "dense_until"),
        ({"part": 0.0}, "part"),
        ({"pressure": 1.5}, "pressure"),
        ({"mass": "much"}, "mass"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs: dict, knob: str):
    with pytest.raises(InvalidConfig) as caught:
        Auto(**knobs)
    assert caught.value.metadata["knob"] == knob
