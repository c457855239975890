"""A session while the daemon works with it: history in memory, KV if hot, and the single-writer lease."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sessiond.backing import Backing
from sessiond.branch import Ids, read_branch
from sessiond.cache import SessionCache
from sessiond.lifecycle import Event, State, advance
from sessiond.storage.log import LogStore
from sessiond.storage.records import RevisionRecord, SessionRecord

if TYPE_CHECKING:
    from sessiond.turn import Turn


@dataclass(slots=True, weakref_slot=True, eq=False)
class Live:
    """State of one session in this process: the only such object while anyone holds it (`Desk.live`).

    Changed only on the event loop, by the holder of `lease`.
    """

    tenant: str
    session_id: str
    lease: asyncio.Lock = field(default_factory=asyncio.Lock)
    editing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while its record is read, changed and written
    state: State = State.COLD
    cache: SessionCache | None = None
    reserved: int = 0  # bytes of memory that a running turn may fill
    backing: Backing | None = None  # where its KV will lie once it is warm, if not in plain memory
    head: str = ""
    chain: list[RevisionRecord] = field(default_factory=list)
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.uint32))
    persisted: int = 0
    attention_mass: float | None = None  # that the last turn's choice held, where it was sampled
    unsaved: bool = False  # its KV could not be written for want of disk space
    turn: Turn | None = None
    settling: asyncio.Task[None] | None = None
    saving: asyncio.Future[Any] | None = None  # a pool's work on the cache; waited for, never abandoned
    stop_saving: threading.Event = field(default_factory=threading.Event)
    last_used: float = field(default_factory=time.monotonic)

    @property
    def owner(self) -> str:
        """Name of this session's sealing work in the engine."""
        return f"{self.tenant}/{self.session_id}"

    def load_history(self, log: LogStore, head: str) -> None:
        """Read the branch that ends at `head`. No-op if it is the one in memory. Raises RecordCorrupt."""
        if self.head == head:
            return
        chain, ids = read_branch(log, self.tenant, head)
        self.head, self.chain, self.ids = head, chain, ids

    def advance(self, event: Event) -> None:
        self.state = advance(self.state, event)

    def give_room_back(self) -> None:
        """What was set aside for a turn, or for warming, is not needed any more."""
        self.reserved, self.backing = 0, None

    def drop_cache(self) -> int:
        """Leave memory; returns the bytes freed. The lease must be held and everything worth keeping persisted."""
        freed = self.cache.nbytes if self.cache else 0
        if self.state is State.HOT:
            self.advance(Event.SUSPEND)
        self.cache = None
        return freed


def touched(record: SessionRecord, now_us: int) -> SessionRecord:
    """The record after use: `last_used` moves, and with a ttl the expiry too. The etag stays."""
    expire = now_us + record.ttl_us if record.ttl_us is not None else record.expire_us
    return replace(record, last_used_us=now_us, expire_us=expire)
