"""Auto settles on full attention or on sieve, by length, memory and what was missed last time."""

from __future__ import annotations

import pytest

from sessiond.errors import InvalidConfig
from sessiond.policies.auto import Auto
from sessiond.policies.base import Situation
from sessiond.policies.full import Full
from sessiond.policies.sieve import Sieve

AUTO = Auto(dense_until=4000, scarce_until=500, pressure=0.8, part=0.1, mass=0.95)


@pytest.mark.parametrize(
    ("situation", "most"),
    [
        (Situation(4000, 0.1), None),
        (Situation(4001, 0.1), 400),
        (Situation(4000, 0.79), None),
        (Situation(4000, 0.8), 400),
        (Situation(500, 0.99), None),
        (Situation(501, 0.99), 64),
        (Situation(5000, 0.1, 0.95), 500),
        (Situation(5000, 0.1, 0.9499), 1000),
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


def test_it_never_reads_more_than_all():
    policy, _ = Auto(dense_until=0, scarce_until=0, part=1.0).settle_on(Situation(100, 0.1, 0.1))
    assert policy == Sieve(least=64, most=100)


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
