"""Places for archives that are written or read: few in all, fewer for a tenant, none for a stream that stalls."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TypeVar

from sessiond.errors import QueueFull, StreamStalled

MOST = 4  # exports and imports at a time: each keeps a thread and a block of KV
MOST_OF_A_TENANT = 2

T = TypeVar("T")


class ArchivePlaces:
    """Owned by the event loop. `idle_seconds`: how long the other side of a stream may keep a place without moving."""

    def __init__(self, idle_seconds: float) -> None:
        self.idle_seconds = idle_seconds
        self._taken: Counter[str] = Counter()

    @contextlib.contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Raises QueueFull if all are taken, or the tenant's."""
        if self._taken.total() >= MOST or self._taken[tenant] >= MOST_OF_A_TENANT:
            raise QueueFull("other archives are being written or read", retry_after=5.0)
        self._taken[tenant] += 1
        try:
            yield
        finally:
            self._taken[tenant] -= 1
            self._taken += Counter()  # forget tenants that have none

    @contextlib.asynccontextmanager
    async def moving(self) -> AsyncIterator[None]:
        """Around one step that waits for the other side. Raises StreamStalled if it takes too long."""
        limit = asyncio.timeout(self.idle_seconds)
        try:
            async with limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise StreamStalled(f"the stream stood still for {self.idle_seconds:g} s") from error

    async def prompt(self, parts: AsyncIterator[T]) -> AsyncGenerator[T]:
        """The parts of a stream that comes in, as long as it does not stall."""
        while True:
            async with self.moving():
                try:
                    part = await anext(parts)
                except StopAsyncIteration:
                    return
            yield part
