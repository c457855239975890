"""The care of the store while it is served: verifying, collecting, compacting, scrubbing. Behind the turns.

Blocking work runs in threads of its own, never in those that turns use. What erases or replaces runs one at a time.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog

from sessiond.audit import Audit
from sessiond.collector import collect
from sessiond.desk import Desk
from sessiond.diskuse import DiskTotals, disk_totals
from sessiond.errors import BadRequest, Draining, SessiondError, StoreReadOnly
from sessiond.mending import mend
from sessiond.sessions import Sessions
from sessiond.storage.findings import Finding, Severity
from sessiond.storage.rows import SessionKey
from sessiond.storage.store import Store
from sessiond.verify import Progress, Verification, scope_of

log = structlog.get_logger()

T = TypeVar("T")

WORK_SECONDS, REST_SECONDS = 0.005, 0.02  # while turns run, care works for the one and then rests for the other
SCRUB_WAITS, SCRUB_WAIT_SECONDS = 100, 0.1  # how long a page of the scrub lets running turns go first


@dataclass(frozen=True, slots=True)
class Summary:
    """What a verification came to."""

    records: int
    n_bytes: int
    cells_recomputed: int
    cells_other_profile: int
    findings: Counter[Severity]
    repaired: int
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Compacted:
    """What compacting gave back."""

    before: DiskTotals
    after: DiskTotals
    free_before: int
    free_after: int
    sessions_purged: int
    records_erased: int
    milliseconds: float


@dataclass(slots=True)
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


class Care:
    """Runs on the event loop; owned by the daemon."""

    def __init__(self, desk: Desk, sessions: Sessions) -> None:
        self.desk = desk
        self.sessions = sessions
        self.collected = 0  # things erased by the collector since the start
        self._alone = asyncio.Lock()
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="care")
        self._pacers: set[threading.Event] = set()
        self._closed = False

    @property
    def store(self) -> Store:
        return self.desk.store

    def close(self) -> None:
        """End what runs, and wait for its threads."""
        self._closed = True
        for stopped in list(self._pacers):
            stopped.set()
        self._pool.shutdown()

    # --- verifying ---------------------------------------------------------------------------------------------------

    async def verify(
        self, session_ids: Iterable[str], *, recompute: float, seed: int, repair: bool
    ) -> AsyncGenerator[Finding | Progress | Summary]:
        """Findings and progress, then the summary. Raises BadRequest, SessionNotFound, StoreReadOnly, Draining."""
        if not 0.0 <= recompute <= 1.0:
            raise BadRequest("recompute is a share, 0 to 1", field="recompute")
        if repair:
            self._refuse_read_only()
        self.sessions.refuse_draining()
        began = time.perf_counter()
        async with AsyncExitStack() as stack:
            if repair:
                await stack.enter_async_context(self._alone)
            ids = list(dict.fromkeys(session_ids))
            scope = await self._in_pool(scope_of, self.store, ids) if ids else None
            pacer = self._pacer()
            run = Verification(self.store, pacer, scope, repair=repair)
            async with aclosing(self._stepped(run.run(), pacer)) as steps:
                async for step in steps:
                    yield step
            audit = Audit(self.desk, recompute, seed or secrets.randbits(63))
            if recompute:
                sessions = scope.sessions if scope else await self._in_pool(_all_sessions, self.store)
                async with aclosing(audit.run(sessions or [])) as found:
                    async for finding in found:
                        told = await self._in_pool(mend, self.store, finding) if repair else finding
                        run.count(told)
                        yield told
        yield Summary(
            records=run.records,
            n_bytes=run.n_bytes,
            cells_recomputed=audit.cells_recomputed,
            cells_other_profile=audit.cells_other_profile,
            findings=run.counts,
            repaired=run.repaired,
            milliseconds=(time.perf_counter() - began) * 1e3,
        )

    async def _stepped(self, steps: Generator[T], pacer: Pacer) -> AsyncGenerator[T]:
        """The steps of blocking work, each taken in a thread. Leaving early ends the work."""
        loop = asyncio.get_running_loop()
        running: asyncio.Future[T | None] | None = None
        try:
            while True:
                running = loop.run_in_executor(self._pool, functools.partial(next, steps, None))
                step = await asyncio.shield(running)
                if step is None:
                    return
                yield step
        finally:
            pacer.stopped.set()
            self._pacers.discard(pacer.stopped)
            if running is not None and not running.done():
                await asyncio.wait([running])
                running.exception()
            steps.close()

    # --- collecting and compacting -----------------------------------------------------------------------------------

    async def collect(self) -> int:
        """Erase what nobody leads to; returns how many things."""
        async with self._alone:
            return await self._collect()

    async def _collect(self) -> int:
        pacer = self._pacer()
        try:
            erased: int = await self._in_pool(collect, self.store, pacer)
        finally:
            self._pacers.discard(pacer.stopped)
        self.collected += erased
        return erased

    async def compact(self, *, purge_deleted: bool) -> Compacted:
        """Erase what is purged or unreferenced, and give free pages back. Raises StoreReadOnly, DiskFull, Draining."""
        self.sessions.refuse_draining()
        self._refuse_read_only()
        began, store = time.perf_counter(), self.store
        async with self._alone:
            before, free_before = await self._in_pool(disk_totals, store), store.free_bytes()
            records = _entries(store)
            purged = await self._purge_deleted() if purge_deleted else 0
            await self._collect()
            erased = max(0, records - _entries(store))  # beside turns: less what these have written meanwhile
            for environment in (store.log.environment, store.blocks.environment):
                await asyncio.wrap_future(environment.compact())
            after = await self._in_pool(disk_totals, store)
        milliseconds = (time.perf_counter() - began) * 1e3
        return Compacted(before, after, free_before, store.free_bytes(), purged, erased, milliseconds)

    async def _purge_deleted(self) -> int:
        purged = 0
        for key in await self._in_pool(_all_sessions, self.store):
            try:
                record = self.store.log.session(key.tenant, key.session_id)
                if record.deleted_us is not None:
                    await self.sessions.purge_deleted(key.tenant, key.session_id)
                    purged += not self.store.log.has_session(key.tenant, key.session_id)
            except SessiondError as error:  # purged meanwhile, or damaged: the others go on
                log.warning("deleted session not purged", session=key.session_id, error=error.message)
        return purged

    # --- by itself ---------------------------------------------------------------------------------------------------

    async def collect_now_and_then(self) -> None:
        """The collector, every `collect_seconds`. Runs until cancelled."""
        while True:
            await asyncio.sleep(self.desk.settings.collect_seconds)
            if self.store.read_only:
                return
            try:
                if erased := await self.collect():
                    log.info("unreferenced records erased", things=erased)
            except Draining:
                return
            except SessiondError as error:
                log.error("collecting failed", error=error.message)
            except Exception:
                log.exception("collecting failed")

    async def scrub(self) -> None:
        """The scrub, at `scrub_bytes_per_second`. Runs until cancelled."""
        while True:
            for _ in range(SCRUB_WAITS):
                if not self.desk.turns:
                    break
                await asyncio.sleep(SCRUB_WAIT_SECONDS)
            try:
                n_bytes = await self._in_pool(self.desk.scrub.step)
            except SessiondError as error:
                log.error("scrubbing failed", error=error.message)
                n_bytes = 0
            except Exception:
                log.exception("scrubbing failed")
                n_bytes = 0
            await asyncio.sleep(n_bytes / self.desk.settings.scrub_bytes_per_second if n_bytes else 1.0)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _pacer(self) -> Pacer:
        pacer = Pacer(lambda: self.desk.turns, lambda: self._closed or self.sessions.draining)
        self._pacers.add(pacer.stopped)
        return pacer

    def _refuse_read_only(self) -> None:
        if self.store.read_only:
            raise StoreReadOnly("an earlier write failed; restart the daemon")

    async def _in_pool(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(function, *args))


def _all_sessions(store: Store) -> list[SessionKey]:
    """Every session the log can read."""
    found: list[SessionKey] = []
    after: tuple[str, str] | None = None
    while page := store.log.sessions(None, after, on_corrupt=lambda _: None):
        found += [SessionKey(record.tenant, record.session_id) for record in page]
        after = found[-1].tenant, found[-1].session_id
    return found


def _entries(store: Store) -> int:
    return store.log.stat().entries + store.blocks.stat().entries
