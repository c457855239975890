"""Sessions and revisions as clients ask for them and see them; domain values, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sessiond.branch import read_branch
from sessiond.desk import Desk
from sessiond.messages import decode_messages
from sessiond.storage.log import LogStore
from sessiond.storage.records import RevisionRecord, SessionRecord
from sessiond.template import Message


@dataclass(frozen=True, slots=True)
class NewSession:
    """A CreateSession request in the daemon's own words."""

    request_id: str
    digest: str
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    model: str = ""
    adapter: str = ""
    policy: tuple[str, dict[str, Any]] = ("full", {})
    labels: dict[str, str] = field(default_factory=dict)
    ttl_us: int | None = None
    expire_us: int | None = None


@dataclass(frozen=True, slots=True)
class Fork:
    """A ForkSession request. An empty `revision_id` is the head; no `policy` is that of the session."""

    session_id: str
    revision_id: str
    request_id: str
    digest: str
    labels: dict[str, str] = field(default_factory=dict)
    recompute: bool = False
    model: str = ""
    adapter: str = ""
    policy: tuple[str, dict[str, Any]] | None = None
    ttl_us: int | None = None
    expire_us: int | None = None


@dataclass(frozen=True, slots=True)
class Rollback:
    """A RollbackSession request."""

    session_id: str
    revision_id: str
    request_id: str
    digest: str
    etag: str = ""


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as clients see it: its record and where its state is now."""

    record: SessionRecord
    hot: bool
    token_count: int
    exact_upto: int
    persisted_upto: int
    bytes_hot: int
    running_request: str
    suspended_request: str


@dataclass(frozen=True, slots=True)
class RevisionView:
    record: RevisionRecord
    asked: list[Message]
    said: list[Message]
    exact_upto: int


def session_view(desk: Desk, record: SessionRecord) -> SessionView:
    """What is known without reading the history."""
    live = desk.lives.get((record.tenant, record.session_id))
    cache = live.cache if live else None
    running = live.turn.plan.request.request_id if live and live.turn else ""
    open_id = str(record.extra.get("open_request", ""))
    count = desk.store.log.revision(record.tenant, record.head_revision).log_end
    return SessionView(
        record=record,
        hot=cache is not None,
        token_count=count,
        exact_upto=min(cache.sealed, count) if cache else 0,
        persisted_upto=live.persisted if live and cache else 0,
        bytes_hot=cache.nbytes if cache else 0,
        running_request=running,
        suspended_request=open_id if open_id != running else "",
    )


async def exact_view(desk: Desk, record: SessionRecord) -> SessionView:
    """As `session_view`; for a cold session also how much of it is sealed and on disk."""
    view = session_view(desk, record)
    if view.hot:
        return view
    chain, ids = await desk.in_pool(read_branch, desk.store.log, record.tenant, record.head_revision)
    sealed, persisted = await desk.in_pool(desk.tiers.persisted_upto, record.tenant, chain, ids)
    return replace(view, exact_upto=sealed, persisted_upto=persisted)


def revision_view(log: LogStore, record: RevisionRecord, exact_upto: int) -> RevisionView:
    """`exact_upto`: that of the session."""
    asked, said = decode_messages(log.messages(record.tenant, record.revision_id))
    return RevisionView(record, asked, said, min(exact_upto, record.position_end))
