"""Long blocking work beside turns: it rests while they run, and can be ended between two of its steps."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from sessiond.errors import Draining

T = TypeVar("T")

WORK_SECONDS, REST_SECONDS = 0.005, 0.02  # while turns run, work for the one and then rest for the other


@dataclass(slots=True, eq=False, weakref_slot=True)
class Pacer:
    """What long work calls between two steps: it rests while turns run, and ends the work when told to."""

    is_busy: Callable[[], object]
    is_over: Callable[[], object]
    stopped: threading.Event = field(default_factory=threading.Event)
    _rested: float = field(default_factory=time.monotonic)

    def __call__(self) -> None:
        """Raises Draining once the work is to end."""
        if self.stopped.is_set() or self.is_over():
            raise Draining("the daemon is shutting down", retry_after=5.0)
        if self.is_busy() and time.monotonic() - self._rested > WORK_SECONDS:
            self.stopped.wait(REST_SECONDS)
            self._rested = time.monotonic()


async def stepped(pool: Executor, steps: Generator[T], pacer: Pacer) -> AsyncGenerator[T]:
    """The steps of blocking work, each taken in a thread of `pool`. Leaving early ends the work."""
    running: asyncio.Future[T | None] | None = None
    try:
        while True:
            running = asyncio.get_running_loop().run_in_executor(pool, functools.partial(next, steps, None))
            step = await asyncio.shield(running)
            if step is None:
                return
            yield step
    finally:
        pacer.stopped.set()
        if running is not None and not running.done():
            await asyncio.wait([running])
            running.exception()
        steps.close()
