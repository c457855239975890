"""What nobody asks for: expiry, idleness and the end of the daemon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

import structlog

from sessiond.desk import Desk
from sessiond.errors import (
    Draining,
    SessiondError,
)
from sessiond.sessions import Sessions

log = structlog.get_logger()


class Keeper:
    """Deletes what has expired, purges what was deleted, lets idle sessions leave memory, drains at the end."""

    def __init__(self, desk: Desk, sessions: Sessions) -> None:
        self.desk = desk
        self.sessions = sessions
        self._told_read_only = False

    async def sweep(self) -> None:
        """Delete expired sessions, purge deleted ones, let idle ones leave memory. Runs until cancelled."""
        while True:
            await asyncio.sleep(self.desk.settings.sweep_seconds)
            await _guarded(self._sweep_once(), "")

    async def _sweep_once(self) -> None:
        self._watch_store()
        due = await self.desk.in_sql(self.desk.store.catalog.due, self.desk.now_us())
        for key in due.expired:
            await _guarded(self.sessions.expire_due(key.tenant, key.session_id), key.session_id)
        for key in due.purgeable:
            await _guarded(self.sessions.purge_due(key.tenant, key.session_id), key.session_id)
        horizon = time.monotonic() - self.desk.settings.idle_seconds
        for live in list(self.desk.lives.values()):
            if live.lease.locked() or live.last_used > horizon:
                continue
            if live.cache:
                await _guarded(self.desk.suspend(live), live.session_id)
            self.desk.forget(live)

    def _watch_store(self) -> None:
        """Say once that the store takes no more writes; write KV that waited for disk space."""
        store = self.desk.store
        if store.read_only and not self._told_read_only:
            self._told_read_only = True
            log.error("the store takes no more writes: a write to it failed; restart the daemon", data=str(store.root))
        waiting = [live for live in self.desk.lives.values() if live.unsaved and not live.lease.locked()]
        if waiting and store.has_space:
            for live in waiting:
                live.unsaved = False
                self.desk.settle(live)

    async def drain(self, seconds: float) -> None:
        """Refuse new turns, let running ones end (suspend them after `seconds`), and persist what is hot."""
        self.sessions.draining = True
        turns = list(self.desk.turns.values())
        if turns:
            _, late = await asyncio.wait([asyncio.create_task(turn.done()) for turn in turns], timeout=seconds)
            if late:
                told = Draining("the daemon is shutting down; the turn goes on after its restart", retry_after=5.0)
                for turn in turns:
                    turn.stop("suspend", told)
                await asyncio.wait(late)
        for live in list(self.desk.lives.values()):
            if live.cache:
                await _guarded(self.desk.suspend(live), live.session_id)


async def _guarded(work: Awaitable[object], session_id: str) -> None:
    """Nobody waits for the keeper: what fails for one session ("": for all) is logged; the others get their turn."""
    try:
        await work
    except SessiondError as error:
        log.error("keeping failed", session=session_id, error=error.message)
    except Exception:
        log.exception("keeping failed", session=session_id)
