"""What every part of the state machine is made of."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

TENANT = "t"
SOME = st.integers(0, 7)


class NoSuchSessionError(Exception):
    """No session is as a rule wants it."""


class Tally:
    """Steps that did something; the machines themselves are made and dropped by hypothesis."""

    steps = 0
    runs = 0


def where_possible(step: Callable[..., None]) -> Callable[..., None]:
    """The step, which does nothing if there is no session for it."""

    @functools.wraps(step)
    def guarded(self: Any, **drawn: Any) -> None:
        with contextlib.suppress(NoSuchSessionError):
            step(self, **drawn)
            Tally.steps += 1

    return guarded
