"""What a record of the log refers to and does not find: each check is one snapshot of the log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sessiond import errors
from sessiond.storage import envelope, keys
from sessiond.storage.environment import Environment, ReadTxn
from sessiond.storage.findings import CHECKSUM, MISSING, Finding, Severity
from sessiond.storage.records import RequestRecord, RevisionRecord, SessionRecord
from sessiond.storage.scan import Checked, check_log_record
from sessiond.types import Span

_REBUILT = (keys.REVISION_INDEX, keys.PIN, keys.CELL_REF, keys.TAIL_REF, keys.PRIOR)


def check_key(env: Environment, key: bytes) -> list[Finding]:
    """What is wrong with one record of the log and with what it refers to; nothing if it is not there (any more)."""
    with env.read() as txn:
        value = txn.get(key)
        return [] if value is None else findings_of(txn, check_log_record(key, bytes(value)))


def findings_of(txn: ReadTxn, checked: Checked) -> list[Finding]:
    """What is wrong with a record that was read, judged by the snapshot `txn`."""
    if checked.damage:
        return [_damaged(txn, checked)]
    if isinstance(checked.record, SessionRecord):
        return list(_of_session(txn, checked.record))
    if isinstance(checked.record, RevisionRecord):
        return list(_of_revision(txn, checked.record))
    if isinstance(checked.record, RequestRecord):
        return list(_of_request(txn, checked.record))
    if _kind(checked.key) == keys.REVISION_INDEX:
        return list(_of_index(txn, checked.key))
    return []


def _damaged(txn: ReadTxn, checked: Checked) -> Finding:
    key, kind, tenant = checked.key, _kind(checked.key), _tenant(checked.key)
    if kind in _REBUILT:
        return Finding(Severity.REPAIRABLE, CHECKSUM, tenant, key, checked.damage, _session_in_key(key))
    message, session_id, tokens = checked.damage, _session_in_key(key), None
    if kind in (keys.REVISION, keys.MESSAGES, keys.TOKENS):
        revision_id = _strings(key)[0] if _strings(key) else ""
        session_id = _session_of(txn, tenant, revision_id)
    if kind == keys.TOKENS and revision_id:
        tokens, readable = _span_lost(txn, tenant, revision_id, keys.tokens_start(key))
        message += f"; {readable}"
    return Finding(Severity.LOSS, CHECKSUM, tenant, key, message, session_id, tokens)


def _of_session(txn: ReadTxn, record: SessionRecord) -> Iterator[Finding]:
    named = [("head", record.head_revision), ("root", record.root_revision)]
    if fork_point := record.extra.get("fork_point"):
        named.append(("fork point", str(fork_point)))
    for what, revision_id in named:
        key = keys.record_key(record.tenant, keys.REVISION, revision_id)
        if txn.get(key) is None:
            yield _lost(record.tenant, key, f"the {what} of the session is missing", record.session_id)
    request_id = record.extra.get("open_request")
    if isinstance(request_id, str) and request_id:
        key = keys.record_key(record.tenant, keys.REQUEST, record.session_id, request_id)
        if txn.get(key) is None:
            yield _lost(record.tenant, key, "the session's open request is missing", record.session_id)


def _of_revision(txn: ReadTxn, record: RevisionRecord) -> Iterator[Finding]:
    tenant, revision_id, session_id = record.tenant, record.revision_id, record.session_id
    if record.parent is not None:
        key = keys.record_key(tenant, keys.REVISION, record.parent)
        if txn.get(key) is None:
            yield _lost(tenant, key, f"the parent of revision {revision_id} is missing", session_id)
    key = keys.record_key(tenant, keys.REVISION_INDEX, session_id, revision_id)
    if txn.get(key) is None:
        yield Finding(Severity.REPAIRABLE, MISSING, tenant, key, "the revision is not indexed", session_id)
    key = keys.record_key(tenant, keys.MESSAGES, revision_id)
    if txn.get(key) is None:
        yield _lost(tenant, key, f"the messages of revision {revision_id} are missing", session_id)
    yield from _gaps(txn, record, record.log_end - record.log_start)


def _gaps(txn: ReadTxn, record: RevisionRecord | RequestRecord, expected: int | None) -> Iterator[Finding]:
    """Tokens of a revision, or of a turn that has not ended, that are not there. Damaged segments tell themselves."""
    first = record.log_start if isinstance(record, RevisionRecord) else 0
    prefix, at = keys.record_key(record.tenant, keys.TOKENS, record.revision_id), 0
    with txn.cursor() as cursor:
        found = cursor.set_range(prefix)
        while found and (key := bytes(cursor.key())).startswith(prefix):
            try:
                n = envelope.unpack(key, cursor.value()).header.get("n")
            except (errors.RecordCorrupt, errors.FormatTooNew):
                return
            start = keys.tokens_start(key)
            if start != at:
                yield _tokens_lost(record, first, min(at, start), max(at, start))
            at = start + (n if isinstance(n, int) else 0)
            found = cursor.next()
    if expected is not None and at != expected:
        yield _tokens_lost(record, first, min(at, expected), max(at, expected))


def _tokens_lost(record: RevisionRecord | RequestRecord, first: int, start: int, end: int) -> Finding:
    span = Span(first + start, first + end)
    message = f"tokens {start} to {end} of revision {record.revision_id} do not join; those before can be read"
    key = keys.tokens_key(record.tenant, record.revision_id, start)
    return Finding(Severity.LOSS, MISSING, record.tenant, key, message, record.session_id, span)


def _of_request(txn: ReadTxn, record: RequestRecord) -> Iterator[Finding]:
    if record.state in ("running", "suspended"):
        yield from _gaps(txn, record, None)
        return
    revision_id = (record.finished or {}).get("revision")
    if not isinstance(revision_id, str) or not revision_id:
        return
    key = keys.record_key(record.tenant, keys.REVISION, revision_id)
    if txn.get(key) is None:
        message = f"the revision that request {record.request_id} became is missing"
        yield _lost(record.tenant, key, message, record.session_id)


def _of_index(txn: ReadTxn, key: bytes) -> Iterator[Finding]:
    tenant, (session_id, revision_id) = _tenant(key), _strings(key)  # it has verified: the key is ours
    revision = keys.record_key(tenant, keys.REVISION, revision_id)
    if txn.get(revision) is None and txn.get(keys.record_key(tenant, keys.SESSION, session_id)) is not None:
        yield _lost(tenant, revision, "a revision of the session is missing", session_id)


def _lost(tenant: str, key: bytes, message: str, session_id: str) -> Finding:
    return Finding(Severity.LOSS, MISSING, tenant, key, message, session_id)


def _span_lost(txn: ReadTxn, tenant: str, revision_id: str, start: int) -> tuple[Span | None, str]:
    """The positions that a damaged segment held, as far as its neighbours tell, and what is left to read."""
    record = _record(txn, keys.record_key(tenant, keys.REVISION, revision_id))
    if not isinstance(record, RevisionRecord):
        return None, f"tokens before {start} of the turn {revision_id} that has not ended can be read"
    end = record.log_end - record.log_start
    prefix = keys.record_key(tenant, keys.TOKENS, revision_id)
    with txn.cursor() as cursor:
        if cursor.set_range(keys.tokens_key(tenant, revision_id, start + 1)):
            key = bytes(cursor.key())
            if key.startswith(prefix):
                end = keys.tokens_start(key)
    lost = Span(record.log_start + start, max(record.log_start + end, record.log_start + start))
    return lost, f"tokens {lost.start} to {lost.end} of the session are lost; those before {lost.start} can be read"


def _session_of(txn: ReadTxn, tenant: str, revision_id: str) -> str:
    """The session that a revision belongs to, by its record or else by the index; empty if neither tells."""
    if not revision_id:
        return ""
    record = _record(txn, keys.record_key(tenant, keys.REVISION, revision_id))
    if isinstance(record, RevisionRecord):
        return record.session_id
    for kind in (keys.REVISION_INDEX, keys.REQUEST):
        prefix = keys.kind_prefix(tenant, kind)
        with txn.cursor() as cursor:
            found = cursor.set_range(prefix)
            while found and (key := bytes(cursor.key())).startswith(prefix):
                if kind == keys.REVISION_INDEX and _strings(key)[-1:] == [revision_id]:
                    return _strings(key)[0]
                if kind == keys.REQUEST:
                    request = check_log_record(key, bytes(cursor.value())).record
                    if isinstance(request, RequestRecord) and request.revision_id == revision_id:
                        return request.session_id
                found = cursor.next()
    return ""


def _record(txn: ReadTxn, key: bytes) -> Any:
    value = txn.get(key)
    return None if value is None else check_log_record(key, bytes(value)).record


def _kind(key: bytes) -> int:
    try:
        return keys.split(key)[1]
    except (ValueError, IndexError):
        return 0


def _tenant(key: bytes) -> str:
    try:
        return keys.split(key)[0]
    except (ValueError, IndexError):
        return ""


def _strings(key: bytes) -> list[str]:
    """The string fields of a key; none if it is no key of this format."""
    try:
        rest = keys.split(key)[2]
        return keys.split_strings(rest[:-8] if _kind(key) == keys.TOKENS else rest)
    except (ValueError, IndexError):
        return []


def _session_in_key(key: bytes) -> str:
    """The session that a key names, if it is of a kind that does."""
    if _kind(key) == keys.PIN:
        return "".join(_strings(key)[1:])
    if _kind(key) not in (keys.SESSION, keys.REQUEST, keys.REVISION_INDEX):
        return ""
    return next(iter(_strings(key)), "")
