"""What the log keeps, as frozen values. Field names are the names on disk (docs/format.md).

Times are integer microseconds since the Unix epoch, UTC. `dict` fields are JSON objects.
"""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

Json = dict[str, Any]
RequestState = Literal["running", "suspended", "finished", "failed", "aborted"]


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session: a pointer to its head revision and everything a client can change about it."""

    tenant: str
    session_id: str
    head_revision: str
    root_revision: str
    model: str
    adapter: str
    identity_id: str
    policy: Json
    labels: dict[str, str]
    created_us: int
    updated_us: int
    last_used_us: int
    ttl_us: int | None
    expire_us: int | None
    deleted_us: int | None
    purge_us: int | None
    generation: int  # the etag: greater with every change
    create_request_id: str
    seal: bool = True
    extra: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RevisionRecord:
    """The immutable result of a committed turn.

    [log_start, log_end) are offsets in the branch's token log, [position_start, position_end) the
    model's positions; they differ once a session outgrows the model. Token segments hold
    `log_end - log_start` tokens.
    """

    tenant: str
    revision_id: str
    session_id: str
    parent: str | None
    kind: Literal["root", "turn", "append"]
    log_start: int
    log_end: int
    position_start: int
    position_end: int
    n_prompt: int
    n_generated: int
    finish_reason: str | None
    aborted: bool
    created_us: int
    request_id: str
    usage: Json
    extra: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request of a session, kept so that its retry never runs it twice."""

    tenant: str
    session_id: str
    request_id: str
    digest: str
    state: RequestState
    base_revision: str
    revision_id: str  # preallocated: the revision the turn becomes
    params: Json
    created_us: int
    updated_us: int
    finished: Json | None = None
    extra: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CellRef:
    """The sealed cell with this chained prefix hash is durable in `blocks`."""

    tenant: str
    prefix_hash: bytes
    index: int
    start: int
    n_tokens: int
    n_records: int
    raw_bytes: int
    coded_bytes: int
    kv_digest: str
    profile_id: str
    extra: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TailRef:
    """Provisional KV of a revision beyond its sealed cells; one a revision, may be longer than a cell."""

    tenant: str
    revision_id: str
    start: int
    length: int
    raw_bytes: int
    coded_bytes: int
    kv_digest: str
    profile_id: str
    generation: int
    extra: Json = field(default_factory=dict)


Record = SessionRecord | RevisionRecord | RequestRecord | CellRef | TailRef
R = TypeVar("R", bound=Record)


def to_header(record: Record) -> Json:
    """The record as a JSON object; bytes become hex. `from_header` is the inverse."""
    return {k: v.hex() if isinstance(v, bytes) else v for k, v in asdict(record).items()}


def from_header(cls: type[R], header: Json) -> R:
    """Rebuild a record. Unknown keys are ignored (a newer minor version wrote them).

    Raises ValueError on a missing field without default or a value of the wrong type.
    """
    values: dict[str, object] = {}
    for name, (hint, required) in _schema(cls).items():
        if name in header:
            values[name] = _checked(name, header[name], hint)
        elif required:
            raise ValueError(f"{cls.__name__} lacks {name!r}")
    return cls(**values)  # type: ignore[arg-type]  # checked above, field by field


def _schema(cls: type[R]) -> dict[str, tuple[Any, bool]]:
    """Field name -> (type, required); computed once a class."""
    if cls not in _SCHEMAS:
        hints = typing.get_type_hints(cls)
        _SCHEMAS[cls] = {
            f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING) for f in fields(cls)
        }
    return _SCHEMAS[cls]


_SCHEMAS: dict[type, dict[str, tuple[Any, bool]]] = {}


def _checked(name: str, value: object, hint: Any) -> object:
    if hint is bytes:
        return bytes.fromhex(value) if isinstance(value, str) else _wrong(name, value)
    return value if _fits(value, hint) else _wrong(name, value)


def _fits(value: object, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, args[1]) for item in value.values())
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _wrong(name: str, value: object) -> typing.NoReturn:
    raise ValueError(f"field {name!r} has a value of type {type(value).__name__}")
