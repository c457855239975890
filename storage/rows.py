"""What goes into and comes out of the catalog."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sessiond.storage.records import SessionRecord

ACTIVE = "active"
DELETED = "deleted"


class SessionKey(NamedTuple):
    tenant: str
    session_id: str


class Listed(NamedTuple):
    """One entry of a listing; the last one of a page is the next page's `after`."""

    created_us: int
    session_id: str


class Due(NamedTuple):
    """Sessions whose time has come, at most `limit` each."""

    expired: list[SessionKey]
    purgeable: list[SessionKey]


@dataclass(frozen=True, slots=True)
class SessionRow:
    """What the index knows about a session."""

    tenant: str
    session_id: str
    state: str
    model: str
    generation: int
    created_us: int
    updated_us: int
    last_used_us: int
    expire_us: int | None
    deleted_us: int | None
    purge_us: int | None
    labels: Mapping[str, str]

    @classmethod
    def of(cls, record: SessionRecord) -> SessionRow:
        """The row that the session's record in the log implies."""
        shared = {name: getattr(record, name) for name in cls.__slots__ if name != "state"}
        return cls(state=ACTIVE if record.deleted_us is None else DELETED, **shared)


@dataclass(frozen=True, slots=True)
class QuotaRow:
    """A tenant's limits; None is unlimited."""

    tenant: str
    max_sessions: int | None = None
    max_disk_bytes: int | None = None
    max_running_turns: int | None = None
