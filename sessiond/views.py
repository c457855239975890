"""Sessions and revisions as clients ask for them and see them; domain values, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
