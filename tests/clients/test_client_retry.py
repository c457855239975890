"""When a client tries again."""

import grpc
import pytest

from sessiond.clients import AbortedError, ResourceExhaustedError, UnavailableError, retry
from sessiond.clients.retry import LONGEST_DELAY, Attempts, RetryRule


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_delays_grow_and_the_limit_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.1)
    clock = Clock()
    attempts = Attempts(RetryRule(60), clock)
    delays = []
    while (delay := attempts.delay_after(UnavailableError("down"))) is not None:
        delays.append(delay)
        clock.now += delay
    assert delays[0] <= 0.1
    assert max(delays) <= LONGEST_DELAY
    # Every delay is at least half the longest, so fewer than five seconds of the limit are left.
    assert 55 <= sum(delays) <= 60


def test_progress_starts_a_new_outage() -> None:
    clock = Clock()
    attempts = Attempts(RetryRule(10), clock)
    assert attempts.delay_after(UnavailableError("down")) is not None
    clock.now = 100
    attempts.progress()
    assert attempts.delay_after(UnavailableError("down again")) is not None
    clock.now = 200
    assert attempts.delay_after(UnavailableError("still down")) is None


def test_the_server_says_how_long_to_wait() -> None:
    assert Attempts(RetryRule(60)).delay_after(UnavailableError("", retry_after=9.0)) == 9.0
    assert Attempts(RetryRule(5)).delay_after(UnavailableError("", retry_after=9.0)) is None


@pytest.mark.parametrize("retry_after", [None, 0.0, 1.0])
def test_other_codes_are_retried_only_if_configured_and_with_retry_info(retry_after: float | None) -> None:
    error = ResourceExhaustedError("full", retry_after=retry_after)
    assert Attempts(RetryRule(60)).delay_after(error) is None
    configured = RetryRule(60, [grpc.StatusCode.RESOURCE_EXHAUSTED])
    assert (Attempts(configured).delay_after(error) is None) is (retry_after is None)
    assert Attempts(configured).delay_after(AbortedError("busy", retry_after=1.0)) is None
