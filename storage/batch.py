"""LogBatch: what changes in the log together. Encoded in the caller's thread, applied in the writer's."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessiond import errors
from sessiond.storage import envelope, keys
from sessiond.storage.environment import Op, WriteTxn
from sessiond.storage.records import (
    CellRef,
    R,
    RequestRecord,
    RevisionRecord,
    SessionRecord,
    TailRef,
    from_header,
    to_header,
)

TOKEN_TEMPLATE = 1  # flag bit 0
MAX_LABEL_KEY = 128  # characters; with the value, within what a PostgreSQL index row holds
MAX_LABEL_VALUE = 256


class LogBatch:
    """An atomic group of changes to one log. Not thread-safe; used once.

    Ops apply in the order they were added. Identifiers out of range raise BadRequest when added.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.n_bytes = 0
        self.frees = True  # only deletions so far; set it last for a change that leads to some

    def put_session(self, record: SessionRecord, *, expect_generation: int | None = None) -> None:
        """Write a session record.

        `expect_generation` is the generation of the record it replaces, compared inside the writer's
        transaction; 0 means that none may exist. The batch then fails with EtagMismatch, SessionNotFound
        or (for 0) SessionExists, and changes nothing. Labels out of range raise BadRequest.
        """
        key = keys.record_key(record.tenant, keys.SESSION, record.session_id)
        _check_labels(record.labels)
        if expect_generation is not None:
            expected = expect_generation
            self.ops.append(lambda txn: _compare_generation(txn, key, record.session_id, expected))
        self._put(key, to_header(record))

    def delete_session(self, tenant: str, session_id: str) -> None:
        """Remove the session record only; revisions and requests have their own deletes."""
        self._delete(keys.record_key(tenant, keys.SESSION, session_id))

    def put_revision(self, record: RevisionRecord, messages: bytes | None = None) -> None:
        """Write a revision, its index entry, and its messages if given (None leaves stored ones alone)."""
        self._put(keys.record_key(record.tenant, keys.REVISION, record.revision_id), to_header(record))
        index = keys.record_key(record.tenant, keys.REVISION_INDEX, record.session_id, record.revision_id)
        self._put(index, {})
        if messages is not None:
            self._put(keys.record_key(record.tenant, keys.MESSAGES, record.revision_id), {}, messages)

    def delete_revision(self, tenant: str, revision_id: str) -> None:
        """Remove a revision, its index entry, messages, tokens, tail reference and prior. Absent parts are fine."""
        key = keys.record_key(tenant, keys.REVISION, revision_id)
        self.ops.append(lambda txn: _delete_index(txn, tenant, revision_id))
        self._delete(key)
        self._delete(keys.record_key(tenant, keys.MESSAGES, revision_id))
        self._delete(keys.record_key(tenant, keys.TAIL_REF, revision_id))
        self._delete(keys.record_key(tenant, keys.PRIOR, revision_id))
        tokens = keys.record_key(tenant, keys.TOKENS, revision_id)
        self.ops.append(lambda txn: delete_range(txn, tokens))

    def put_index(self, tenant: str, session_id: str, revision_id: str) -> None:
        """Write a revision's index entry again."""
        self._put(keys.record_key(tenant, keys.REVISION_INDEX, session_id, revision_id), {})

    def delete_index(self, tenant: str, session_id: str, revision_id: str) -> None:
        """Remove an index entry only."""
        self._delete(keys.record_key(tenant, keys.REVISION_INDEX, session_id, revision_id))

    def put_request(self, record: RequestRecord) -> None:
        key = keys.record_key(record.tenant, keys.REQUEST, record.session_id, record.request_id)
        self._put(key, to_header(record))

    def delete_requests(self, tenant: str, session_id: str) -> None:
        """Remove all request records of a session."""
        prefix = keys.record_key(tenant, keys.REQUEST, session_id)
        self.ops.append(lambda txn: delete_range(txn, prefix))

    def append_tokens(
        self, tenant: str, revision_id: str, start: int, ids: NDArray[Any], flags: NDArray[Any] | None = None
    ) -> None:
        """Write one segment: `ids` [n] (stored as uint32) and `flags` [n] (uint8, default 0), n >= 1.

        `start` is the offset of ids[0] within the revision. Raises BadTokens for ids outside uint32. The batch fails
        if the segment before it is not there: a log never has a gap, also where one write of several is refused.
        """
        if ids.ndim != 1 or len(ids) == 0 or (flags is not None and flags.shape != ids.shape):
            raise errors.BadTokens(f"token segment of shape {ids.shape}")
        if int(ids.min()) < 0 or int(ids.max()) > 0xFFFFFFFF:
            raise errors.BadTokens("token id outside uint32")
        if flags is None:
            flags = np.zeros(len(ids), np.uint8)
        body = ids.astype("<u4").tobytes() + flags.astype(np.uint8).tobytes()
        if start:
            self.ops.append(lambda txn: _check_joined(txn, tenant, revision_id, start))
        self._put(keys.tokens_key(tenant, revision_id, start), {"n": len(ids)}, body)

    def put_cell_ref(self, ref: CellRef) -> None:
        self._put(keys.cell_ref_key(ref.tenant, ref.prefix_hash), to_header(ref))

    def delete_cell_ref(self, tenant: str, prefix_hash: bytes) -> None:
        self._delete(keys.cell_ref_key(tenant, prefix_hash))

    def put_tail_ref(self, ref: TailRef) -> None:
        self._put(keys.record_key(ref.tenant, keys.TAIL_REF, ref.revision_id), to_header(ref))

    def delete_tail_ref(self, tenant: str, revision_id: str) -> None:
        self._delete(keys.record_key(tenant, keys.TAIL_REF, revision_id))

    def put_prior(self, tenant: str, revision_id: str, header: dict[str, Any], scores: bytes) -> None:
        """Write what is known of a revision's tokens; the batch fails (RevisionNotFound) if that is not there."""
        self.ops.append(lambda txn: _check_revision(txn, tenant, revision_id))
        self._put(keys.record_key(tenant, keys.PRIOR, revision_id), header, scores)

    def delete_prior(self, tenant: str, revision_id: str) -> None:
        self._delete(keys.record_key(tenant, keys.PRIOR, revision_id))

    def pin_revision(self, tenant: str, revision_id: str, session_id: str) -> None:
        """Note that a session was forked at a revision; the batch fails (RevisionNotFound) if it is not there."""
        self.ops.append(lambda txn: _check_revision(txn, tenant, revision_id))
        self._put(keys.record_key(tenant, keys.PIN, revision_id, session_id), {})

    def unpin_revision(self, tenant: str, revision_id: str, session_id: str) -> None:
        self._delete(keys.record_key(tenant, keys.PIN, revision_id, session_id))

    def expect_pins(self, tenant: str, revision_id: str, known: Collection[str]) -> None:
        """The batch fails (Aborted) if a session other than those `known` has been forked at the revision."""
        self.ops.append(lambda txn: _check_pins(txn, tenant, revision_id, known))

    def put_identity(self, identity_id: str, fields: dict[str, Any]) -> None:
        """Register what an identity id stands for."""
        self._put(keys.global_key(keys.IDENTITY, identity_id), fields)

    def put_profile(self, profile_id: str, fields: dict[str, Any]) -> None:
        """Register what a numerics profile id stands for."""
        self._put(keys.global_key(keys.PROFILE, profile_id), fields)

    def _put(self, key: bytes, header: dict[str, Any], body: bytes = b"") -> None:
        value = envelope.pack(key, header, body)
        self.n_bytes += len(value)
        self.frees = False
        self.ops.append(lambda txn: _put_value(txn, key, value))

    def _delete(self, key: bytes) -> None:
        self.ops.append(lambda txn: _delete_value(txn, key))


def _check_labels(labels: dict[str, str]) -> None:
    """The log refuses what the catalog's index (PostgreSQL's above all) could not hold."""
    for key, value in labels.items():
        if "\0" in key + value or not key:
            raise errors.BadRequest("label keys must not be empty and labels must not contain NUL")
        if len(key) > MAX_LABEL_KEY or len(value) > MAX_LABEL_VALUE:
            raise errors.BadRequest(
                f"labels have at most {MAX_LABEL_KEY} characters in the key, {MAX_LABEL_VALUE} in the value"
            )


def delete_range(txn: WriteTxn, prefix: bytes) -> None:
    """Delete every key that starts with `prefix`."""
    with txn.cursor() as cursor:
        found = cursor.set_range(prefix)
        while found and cursor.key().startswith(prefix):
            cursor.delete()  # moves to the next key
            found = bool(cursor.key())


def iter_range(txn: WriteTxn, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    with txn.cursor() as cursor:
        found = cursor.set_range(prefix)
        while found and cursor.key().startswith(prefix):
            yield cursor.key(), cursor.value()
            found = cursor.next()


def join_segments(parts: list[tuple[bytes, memoryview]]) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Verify and join (key, value) token segments in key order; copies out of the values.

    Raises RecordCorrupt if one is damaged, does not start at 0 or where the one before it ended.
    """
    ids, flags, at = [], [], 0
    for key, value in parts:
        record = envelope.unpack(key, value)
        n = record.header.get("n")
        if not isinstance(n, int) or n < 1 or len(record.body) != 5 * n:
            raise envelope.corrupt(key, "token count does not fit the body")
        if keys.tokens_start(key) != at:
            raise envelope.corrupt(key, f"token segments have a gap or overlap: expected offset {at}")
        ids.append(np.frombuffer(record.body, "<u4", n))
        flags.append(np.frombuffer(record.body, np.uint8, n, 4 * n))
        at += n
    if not ids:
        return np.empty(0, np.uint32), np.empty(0, np.uint8)
    return np.concatenate(ids).astype(np.uint32, copy=False), np.concatenate(flags)


def _put_value(txn: WriteTxn, key: bytes, value: bytes) -> None:
    txn.put(key, value)


def _check_joined(txn: WriteTxn, tenant: str, revision_id: str, start: int) -> None:
    prefix = keys.record_key(tenant, keys.TOKENS, revision_id)
    end = 0
    with txn.cursor() as cursor:
        found = cursor.prev() if cursor.set_range(keys.tokens_key(tenant, revision_id, start)) else cursor.last()
        if found and (key := bytes(cursor.key())).startswith(prefix):
            n = envelope.unpack(key, memoryview(cursor.value())).header.get("n")
            end = keys.tokens_start(key) + (n if isinstance(n, int) else 0)
    if end != start:
        raise errors.SessiondError(f"tokens {start} and on of revision {revision_id} would leave a gap behind {end}")


def _check_revision(txn: WriteTxn, tenant: str, revision_id: str) -> None:
    if txn.get(keys.record_key(tenant, keys.REVISION, revision_id)) is None:
        raise errors.RevisionNotFound(f"no revision {revision_id}")


def _check_pins(txn: WriteTxn, tenant: str, revision_id: str, known: Collection[str]) -> None:
    for key, _ in iter_range(txn, keys.record_key(tenant, keys.PIN, revision_id)):
        session_id = keys.split_strings(keys.split(key)[2])[1]
        if session_id not in known:
            raise errors.Aborted(f"session {session_id} has been forked at revision {revision_id}")


def _delete_value(txn: WriteTxn, key: bytes) -> None:
    txn.delete(key)


def _compare_generation(txn: WriteTxn, key: bytes, session_id: str, expected: int) -> None:
    value = txn.get(key)
    if value is None:
        if expected != 0:
            raise errors.SessionNotFound(f"no session {session_id}")
        return
    if expected == 0:
        raise errors.SessionExists(f"session {session_id} exists")
    stored = parse(SessionRecord, key, memoryview(value)).generation
    if stored != expected:
        raise errors.EtagMismatch(f"session {session_id} changed: generation {stored}, expected {expected}")


def parse(cls: type[R], key: bytes, value: memoryview) -> R:
    """Verify a stored record and rebuild its dataclass. Raises RecordCorrupt."""
    try:
        return from_header(cls, envelope.unpack(key, value).header)
    except ValueError as exc:
        raise envelope.corrupt(key, str(exc)) from exc


def _delete_index(txn: WriteTxn, tenant: str, revision_id: str) -> None:
    key = keys.record_key(tenant, keys.REVISION, revision_id)
    value = txn.get(key)
    if value is None:
        return
    try:
        record = parse(RevisionRecord, key, memoryview(value))
    except errors.RecordCorrupt:
        pass  # a damaged revision can still be purged: find its index entry the slow way
    else:
        txn.delete(keys.record_key(tenant, keys.REVISION_INDEX, record.session_id, revision_id))
        return
    for found, _ in list(iter_range(txn, keys.kind_prefix(tenant, keys.REVISION_INDEX))):
        if keys.split_strings(keys.split(found)[2])[1] == revision_id:
            txn.delete(found)
