"""The care of the store while it is served: verifying, collecting, compacting, scrubbing. Behind the turns.

Blocking work runs in threads of its own, never in those that turns use. What erases or replaces runs one at a time.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import structlog

from sessiond.audit import Audit
from sessiond.collector import collect
from sessiond.desk import Desk
from sessiond.diskuse import DiskTotals, disk_totals
from sessiond.errors import BadRequest, Draining, SessiondError, StoreReadOnly
from sessiond.mending import mend
from sessiond.pacing import Pacer, stepped
from sessiond.sessions import Sessions
from sessiond.storage.findings import Finding, Severity
from sessiond.storage.rows import SessionKey
from sessiond.storage.store import Store
from sessiond.verify import Progress, Verification, scope_of

log = structlog.get_logger()

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


class Care:
    """Runs on the event loop; owned by the daemon."""

    def __init__(self, desk: Desk, sessions: Sessions) -> None:
        self.desk = desk
        self.sessions = sessions
        self.collected = 0  # things erased by the collector since the start
        self._alone = asyncio.Lock()
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="care")
        self._pacers: weakref.WeakSet[Pacer] = weakref.WeakSet()
        self._closed = False

    @property
    def store(self) -> Store:
        return self.desk.store

    def close(self) -> None:
        """End what runs, and wait for its threads."""
        self._closed = True
        for pacer in list(self._pacers):
            pacer.stopped.set()
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
            async with aclosing(stepped(self._pool, run.run(), pacer)) as steps:
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

    # --- collecting and compacting -----------------------------------------------------------------------------------

    async def collect(self) -> int:
        """Erase what nobody leads to; returns how many things."""
        async with self._alone:
            return await self._collect()

    async def _collect(self) -> int:
        erased: int = await self._in_pool(collect, self.store, self._pacer())
        self.collected += erased
        return erased

    async def compact(self, *, purge_deleted: bool) -> Compacted:
        """Erase what is purged or unreferenced, and give free pages back.

        Raises StoreReadOnly, DiskFull, Draining; DataDirectoryReadOnly if a copy cannot be made.
        """
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
        self._pacers.add(pacer)
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
