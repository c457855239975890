"""The way to the event loop from other threads: calls that gather while it is busy arrive together.

Each wake of the loop's thread takes a core from the model's step; eight sessions' tokens, durable at once, need one.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

import structlog

log = structlog.get_logger()


class Handover:
    """Runs calls of any thread on the loop, in the order they came."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._waking = threading.Lock()
        self._woken = False

    def call(self, function: Callable[[], None]) -> None:
        """From any thread; what that thread asks of the loop afterwards comes afterwards.

        Raises RuntimeError once the loop is closed. What `function` raises is logged.
        """
        self._waiting.append(function)
        with self._waking:  # who finds it woken must find it told, too
            if self._woken:
                return
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._run)
            except BaseException:
                self._woken = False
                raise

    def _run(self) -> None:
        self._woken = False  # before looking: who appends from here on is seen below, or wakes the loop again
        while self._waiting:
            try:
                self._waiting.popleft()()
            except Exception:
                log.exception("a call from another thread failed")
