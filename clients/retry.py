"""When to try again, and after how long. No clock and no sleep of its own: both clients use it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import grpc

from sessiond.clients.errors import SessiondClientError

FIRST_DELAY = 0.1
LONGEST_DELAY = 5.0


@dataclass(frozen=True, slots=True)
class RetryRule:
    """Retry UNAVAILABLE, and `codes` that came with RetryInfo, for `seconds` after the last progress."""

    seconds: float = 60.0
    codes: Collection[grpc.StatusCode] = ()
    longest_delay: float = LONGEST_DELAY

    def allows(self, error: SessiondClientError) -> bool:
        if error.code is grpc.StatusCode.UNAVAILABLE:
            return True
        return error.code in self.codes and error.retry_after is not None


class Attempts:
    """The attempts at one call: exponential backoff with jitter, never sooner than the server asks."""

    def __init__(self, rule: RetryRule, clock: Callable[[], float] = time.monotonic) -> None:
        self._rule = rule
        self._clock = clock
        self._failures = 0
        self._failing_since: float | None = None

    def progress(self) -> None:
        """Something new arrived: the next failure starts a new outage."""
        self._failures = 0
        self._failing_since = None

    def delay_after(self, error: SessiondClientError) -> float | None:
        """Seconds to wait before trying again; None: give up and raise `error`."""
        if not self._rule.allows(error):
            return None
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        longest = min(FIRST_DELAY * 2.0**self._failures, self._rule.longest_delay)
        self._failures += 1
        # Clients of a restarted server must not come back all at once.
        delay = max(longest * random.uniform(0.5, 1.0), error.retry_after or 0.0)  # noqa: S311 - jitter, no secret
        left = self._failing_since + self._rule.seconds - now
        return delay if delay <= left else None
