"""SIGKILL of the whole daemon. Tokens streamed before they are durable are lost by it."""

from __future__ import annotations

import pytest
from kinds import BY_NAME, chunks


def test_the_client_that_comes_back_sees_nothing_of_a_kill(run_slice):
    run_slice("kill_daemon")


def test_tokens_streamed_before_they_are_logged_are_lost_by_a_kill(run_control):
    run_control("kill_daemon", "log_late", 1, shows=lambda outcome: outcome.lost_tokens > 0)


@pytest.mark.parametrize("column", ["ci", "release"])
def test_a_column_passes_every_point(column: str):
    from kill_points import POINTS

    assert len(POINTS) >= 40
    assert len({point.name for point in POINTS}) == len(POINTS)
    parts = chunks(BY_NAME["kill_daemon"], column, seed=123_456)
    assert len({count for count, _ in parts}) == 1, "a shorter chunk would begin where another one does"
    passed = [(seed * count + trial) % len(POINTS) for count, seed in parts for trial in range(count)]
    assert set(passed) == set(range(len(POINTS)))
