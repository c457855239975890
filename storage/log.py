"""LogStore: the durable truth about sessions. Changes are LogBatch values given to `write`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessiond import errors
from sessiond.storage import envelope, keys
from sessiond.storage.batch import LogBatch, join_segments, parse
from sessiond.storage.environment import Environment, EnvironmentStat, ReadTxn
from sessiond.storage.records import CellRef, R, RequestRecord, RevisionRecord, SessionRecord, TailRef

OnCorrupt = Callable[[errors.RecordCorrupt], None]


class LogStore:
    """Thread-safe. Every read runs in its own short transaction and returns copies.

    Every read may raise RecordCorrupt (naming the key), FormatTooNew, or Draining after close().
    Another tenant's record is as absent as one that never was.
    """

    def __init__(self, env: Environment) -> None:
        self._env = env

    @property
    def environment(self) -> Environment:
        """What it is stored in, for the care of the store."""
        return self._env

    def write(self, batch: LogBatch) -> Future[None]:
        """Queue an atomic change; the future resolves when it is durable (see Environment.submit)."""
        return self._env.submit(batch.ops, batch.n_bytes, frees=batch.frees)

    def together(self) -> contextlib.AbstractContextManager[None]:
        """What this thread writes inside the block becomes durable at once (see Environment.together)."""
        return self._env.together()

    def session(self, tenant: str, session_id: str) -> SessionRecord:
        """Raises SessionNotFound."""
        record = self._get(SessionRecord, keys.record_key(tenant, keys.SESSION, session_id))
        if record is None:
            raise errors.SessionNotFound(f"no session {session_id}")
        return record

    def has_session(self, tenant: str, session_id: str) -> bool:
        """Whether there is a record, readable or not."""
        with self._env.read() as txn:
            return txn.get(keys.record_key(tenant, keys.SESSION, session_id)) is not None

    def sessions(
        self,
        tenant: str | None = None,
        after: tuple[str, str] | None = None,
        limit: int = 1000,
        on_corrupt: OnCorrupt | None = None,
    ) -> list[SessionRecord]:
        """Up to `limit` sessions in key order, of one tenant or of all, after (tenant, session_id).

        With `on_corrupt`, damaged records are handed to it and skipped (a page may then be short but is
        only empty at the end); without, the first one is raised.
        """
        out: list[SessionRecord] = []
        for name in [tenant] if tenant is not None else self.tenants():
            prefix = keys.kind_prefix(name, keys.SESSION)
            if after is not None and keys.tenant_prefix(name) < keys.tenant_prefix(after[0]):
                continue
            start = keys.record_key(*_session_key(after)) if after is not None and after[0] == name else prefix
            with self._env.read() as txn:
                for key, value in _range(txn, prefix, start):
                    if key == start:
                        continue
                    out += _readable(SessionRecord, key, value, on_corrupt)
                    if len(out) >= limit:
                        return out
        return out

    def ids(self, tenant: str, kind: int, *owner: str) -> list[str]:
        """Ids of all records of a kind (sessions; revision index, requests: of a session), in key order.

        Read from the keys alone: damaged records are among them.
        """
        prefix = keys.record_key(tenant, kind, *owner)
        with self._env.read() as txn:
            return [keys.split_strings(keys.split(key)[2])[-1] for key, _ in _range(txn, prefix)]

    def tenants(self) -> list[str]:
        """Every tenant that owns a record, in key order."""
        with self._env.read() as txn:
            return list(_tenants(txn))

    def revision(self, tenant: str, revision_id: str) -> RevisionRecord:
        """Raises RevisionNotFound."""
        with self._env.read() as txn:
            return _revision(txn, tenant, revision_id)

    def messages(self, tenant: str, revision_id: str) -> bytes | None:
        """The opaque messages stored with a revision, or None."""
        key = keys.record_key(tenant, keys.MESSAGES, revision_id)
        with self._env.read() as txn:
            value = txn.get(key)
            return None if value is None else bytes(envelope.unpack(key, value).body)

    def prior(self, tenant: str, revision_id: str) -> tuple[dict[str, Any], bytes] | None:
        """Header and scores of what is known of a revision's tokens, or None."""
        key = keys.record_key(tenant, keys.PRIOR, revision_id)
        with self._env.read() as txn:
            value = txn.get(key)
            if value is None:
                return None
            record = envelope.unpack(key, value)
            return record.header, bytes(record.body)

    def chain(self, tenant: str, head: str) -> list[RevisionRecord]:
        """The revisions from the root to `head`, as one snapshot.

        Raises RevisionNotFound if `head` is absent, RecordCorrupt if an ancestor is or parents form a ring.
        """
        with self._env.read() as txn:
            record = _revision(txn, tenant, head)
            out, seen = [record], {head}
            while record.parent is not None:
                key = keys.record_key(tenant, keys.REVISION, record.parent)
                if record.parent in seen:
                    raise envelope.corrupt(key, "is its own ancestor")
                seen.add(record.parent)
                try:
                    record = _revision(txn, tenant, record.parent)
                except errors.RevisionNotFound as exc:
                    raise envelope.corrupt(key, f"missing, but an ancestor of {head}") from exc
                out.append(record)
        return out[::-1]

    def revisions_of_session(self, tenant: str, session_id: str) -> list[RevisionRecord]:
        """A session's own revisions, oldest first. Those before a fork belong to the other session."""
        prefix = keys.record_key(tenant, keys.REVISION_INDEX, session_id)
        with self._env.read() as txn:
            found = []
            for key, value in _range(txn, prefix):
                envelope.unpack(key, value)
                found.append(_revision(txn, tenant, keys.split_strings(keys.split(key)[2])[1]))
        return sorted(found, key=lambda record: (record.created_us, record.log_end, record.revision_id))

    def tokens(
        self, tenant: str, revision_id: str, expected: int | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """A revision's own token ids and flags, [n] each; empty if none are logged.

        Raises RecordCorrupt if segments do not join or their count is not `expected` (when given).
        """
        prefix = keys.record_key(tenant, keys.TOKENS, revision_id)
        with self._env.read() as txn:
            ids, flags = join_segments(list(_range(txn, prefix)))
        if expected is not None and len(ids) != expected:
            why = f"holds {len(ids)} tokens, the revision says {expected}"
            raise envelope.corrupt(keys.tokens_key(tenant, revision_id, 0), why)
        return ids, flags

    def request(self, tenant: str, session_id: str, request_id: str) -> RequestRecord | None:
        return self._get(RequestRecord, keys.record_key(tenant, keys.REQUEST, session_id, request_id))

    def requests(self, tenant: str, session_id: str) -> list[RequestRecord]:
        """All requests of a session, oldest first."""
        prefix = keys.record_key(tenant, keys.REQUEST, session_id)
        with self._env.read() as txn:
            found = [parse(RequestRecord, key, value) for key, value in _range(txn, prefix)]
        return sorted(found, key=lambda record: (record.created_us, record.request_id))

    def cell_ref(self, tenant: str, prefix_hash: bytes) -> CellRef | None:
        return self.cell_refs(tenant, [prefix_hash])[0]

    def cell_refs(self, tenant: str, prefix_hashes: Sequence[bytes]) -> list[CellRef | None]:
        """The references of these cells, in order, None where absent, as one snapshot."""
        out: list[CellRef | None] = []
        with self._env.read() as txn:
            for prefix_hash in prefix_hashes:
                key = keys.cell_ref_key(tenant, prefix_hash)
                value = txn.get(key)
                out.append(None if value is None else parse(CellRef, key, value))
        return out

    def all_cell_refs(self, tenant: str, on_corrupt: OnCorrupt | None = None) -> list[CellRef]:
        """Every cell reference of a tenant, in hash order; `on_corrupt` as for `sessions`."""
        out: list[CellRef] = []
        with self._env.read() as txn:
            for key, value in _range(txn, keys.kind_prefix(tenant, keys.CELL_REF)):
                out += _readable(CellRef, key, value, on_corrupt)
        return out

    def all_tail_refs(self, tenant: str, on_corrupt: OnCorrupt | None = None) -> list[TailRef]:
        """Every tail reference of a tenant, in revision order; `on_corrupt` as for `sessions`."""
        out: list[TailRef] = []
        with self._env.read() as txn:
            for key, value in _range(txn, keys.kind_prefix(tenant, keys.TAIL_REF)):
                out += _readable(TailRef, key, value, on_corrupt)
        return out

    def pins(self, tenant: str, revision_id: str) -> list[str]:
        """Sessions that were forked at a revision. Read from the keys alone."""
        return self.ids(tenant, keys.PIN, revision_id)

    def tail_ref(self, tenant: str, revision_id: str) -> TailRef | None:
        return self._get(TailRef, keys.record_key(tenant, keys.TAIL_REF, revision_id))

    def identity(self, identity_id: str) -> dict[str, Any] | None:
        return self._fields(keys.global_key(keys.IDENTITY, identity_id))

    def identities(self) -> list[str]:
        """The ids of all registered identities."""
        with self._env.read() as txn:
            prefix = keys.global_key(keys.IDENTITY, "x")[:2]
            return [keys.split_strings(keys.split(key)[2])[0] for key, _ in _range(txn, prefix)]

    def profile(self, profile_id: str) -> dict[str, Any] | None:
        return self._fields(keys.global_key(keys.PROFILE, profile_id))

    def stat(self) -> EnvironmentStat:
        return self._env.stat()

    def close(self) -> None:
        """Flush and close. Idempotent."""
        self._env.close()

    def _fields(self, key: bytes) -> dict[str, Any] | None:
        with self._env.read() as txn:
            value = txn.get(key)
            return None if value is None else envelope.unpack(key, value).header

    def _get(self, cls: type[R], key: bytes) -> R | None:
        with self._env.read() as txn:
            value = txn.get(key)
            return None if value is None else parse(cls, key, value)


def _readable(cls: type[R], key: bytes, value: memoryview, on_corrupt: OnCorrupt | None) -> Iterator[R]:
    """The record; or nothing, if it is damaged and `on_corrupt` is there to be told."""
    try:
        yield parse(cls, key, value)
    except errors.RecordCorrupt as exc:
        if on_corrupt is None:
            raise
        on_corrupt(exc)


def _session_key(at: tuple[str, str]) -> tuple[str, int, str]:
    return at[0], keys.SESSION, at[1]


def _revision(txn: ReadTxn, tenant: str, revision_id: str) -> RevisionRecord:
    key = keys.record_key(tenant, keys.REVISION, revision_id)
    value = txn.get(key)
    if value is None:
        raise errors.RevisionNotFound(f"no revision {revision_id}")
    return parse(RevisionRecord, key, value)


def _range(txn: ReadTxn, prefix: bytes, start: bytes | None = None) -> Iterator[tuple[bytes, memoryview]]:
    with txn.cursor() as cursor:
        found = cursor.set_range(start or prefix)
        while found:
            key = bytes(cursor.key())
            if not key.startswith(prefix):
                return
            yield key, cursor.value()
            found = cursor.next()


def _tenants(txn: ReadTxn) -> Iterator[str]:
    with txn.cursor() as cursor:
        found = cursor.set_range(b"\x01")  # skip the empty tenant
        while found:
            tenant = keys.split(bytes(cursor.key()))[0]
            yield tenant
            found = cursor.set_range(keys.after(keys.tenant_prefix(tenant)))
