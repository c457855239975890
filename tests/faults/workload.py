"""A fake engine that writes what a daemon writes, in the daemon's order, and tells the oracle.

Sessions one after the other: creation, turns (request and prompt, tokens one by one, then the revision or a discard),
sealed cells (records, then references), tails (records, reference, then the older ones go), and purges of old sessions.
After a restart the newest session goes on where the log says it stands.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

from oracle import Oracle
from script import (
    CELL_TOKENS,
    IDENTITY,
    KEPT_SESSIONS,
    TENANT,
    TURNS,
    Script,
    request_id,
    revision_id,
    session_id,
)

from sessiond import errors
from sessiond.storage import keys
from sessiond.storage.batch import LogBatch
from sessiond.storage.codec import ExponentPlanes
from sessiond.storage.kv import KVOwner, encode_kv, kv_digest
from sessiond.storage.records import CellRef, RequestRecord, RevisionRecord, SessionRecord, TailRef
from sessiond.storage.rows import QuotaRow, SessionRow
from sessiond.storage.store import Store

CODEC = ExponentPlanes()


class Workload:
    """Writes until a step raises, or for `n_sessions` from the one that stands open."""

    def __init__(self, store: Store, oracle: Oracle, seed: int) -> None:
        self.store = store
        self.oracle = oracle
        self.script = Script(seed)

    def run(self, n_sessions: int) -> None:
        numbers = [int(name[1:]) for name in self.store.log.ids(TENANT, keys.SESSION)]
        first = max(numbers, default=0)
        for session in range(first, first + n_sessions):
            self.play(session)

    def play(self, session: int) -> None:
        """One session from where it stands to its end."""
        try:
            self.store.log.session(TENANT, session_id(session))
        except errors.SessionNotFound:
            self._create(session)
        for turn in range(TURNS):
            request = self.store.log.request(TENANT, session_id(session), request_id(session, turn))
            if request is None or request.state == "running":
                self._turn(session, turn, request is not None)
        if session >= KEPT_SESSIONS:
            self._purge(session - KEPT_SESSIONS)

    def _create(self, session: int) -> None:
        record = session_record(session)
        batch = LogBatch()
        batch.put_revision(revision_record(self.script, session, -1, None), b"[]")
        batch.put_session(record, expect_generation=0)
        self._step(batch, "create", session)
        self.store.catalog.upsert_sessions([SessionRow.of(record)])
        self.oracle.intend("quota", session + 1)
        self.store.catalog.set_quota(QuotaRow(TENANT, max_sessions=session + 1), 1)
        self.oracle.acknowledge("quota", session + 1)

    def _turn(self, session: int, turn: int, is_open: bool) -> None:
        said = self.script.said(session, turn)
        if not is_open:
            self._open(session, turn)
        logged = len(self.store.log.tokens(TENANT, revision_id(session, turn))[0]) - len(said.prompt)
        pending = [self._token(session, turn, i) for i in range(logged, len(said.generated))]
        for done in pending:
            done.result()
        if self.script.is_discarded(session, turn):
            self._discard(session, turn)
            return
        self._commit(session, turn)
        self._persist_cells(session, turn)
        self._persist_tail(session, turn)

    def _open(self, session: int, turn: int) -> None:
        said, record = self.script.said(session, turn), self._session(session)
        batch = LogBatch()
        batch.put_request(request_record(session, turn, "running"))
        batch.append_tokens(TENANT, revision_id(session, turn), 0, said.prompt, said.flags[: len(said.prompt)])
        batch.put_session(replace(record, extra={"open_request": request_id(session, turn)}))
        self._step(batch, "open", session, turn)

    def _token(self, session: int, turn: int, i: int) -> Future[None]:
        said = self.script.said(session, turn)
        batch = LogBatch()
        start = len(said.prompt) + i
        batch.append_tokens(TENANT, revision_id(session, turn), start, said.generated[i : i + 1])
        self.oracle.intend("token", session, turn, i)
        done = self.store.log.write(batch)
        done.add_done_callback(
            lambda done: self.oracle.acknowledge("token", session, turn, i) if done.exception() is None else None
        )
        return done

    def _commit(self, session: int, turn: int) -> None:
        said, record = self.script.said(session, turn), self._session(session)
        name = revision_id(session, turn)
        batch = LogBatch()
        batch.delete_revision(TENANT, name)
        batch.append_tokens(TENANT, name, 0, said.ids, said.flags)
        batch.put_revision(revision_record(self.script, session, turn, record.head_revision), said.messages)
        head = replace(record, head_revision=name, generation=record.generation + 1, extra={})
        batch.put_session(head, expect_generation=record.generation)
        batch.put_request(request_record(session, turn, "finished"))
        self._step(batch, "commit", session, turn)
        self.store.catalog.upsert_sessions([SessionRow.of(head)])

    def _discard(self, session: int, turn: int) -> None:
        batch = LogBatch()
        batch.delete_revision(TENANT, revision_id(session, turn))
        batch.put_session(replace(self._session(session), extra={}))
        batch.put_request(request_record(session, turn, "aborted"))
        self._step(batch, "discard", session, turn)

    def _persist_cells(self, session: int, turn: int) -> None:
        ids = self.script.history(session, turn)
        for index, name in enumerate(self.script.cells(ids)):
            if self.store.log.cell_ref(TENANT, name) is not None:
                continue
            arrays = self.script.kv(session, index * CELL_TOKENS, CELL_TOKENS)
            coded = encode_kv(KVOwner(TENANT, "cell", name), index * CELL_TOKENS, arrays, codec=CODEC)
            ref = CellRef(
                TENANT, name, index, index * CELL_TOKENS, CELL_TOKENS, len(coded.records), coded.raw_bytes,
                coded.coded_bytes, coded.kv_digest, "profile",
            )  # fmt: skip
            batch = LogBatch()
            batch.put_cell_ref(ref)
            self.oracle.intend("cell", session, index)
            self._records_then_reference(coded.records, batch)
            self.oracle.acknowledge("cell", session, index)

    def _persist_tail(self, session: int, turn: int) -> None:
        ids, record = self.script.history(session, turn), self._session(session)
        start = len(ids) // CELL_TOKENS * CELL_TOKENS
        if start == len(ids):
            return
        arrays = self.script.kv(session, start, len(ids) - start)
        owner = KVOwner(TENANT, "tail", record.head_revision.encode(), turn + 1)
        coded = encode_kv(owner, start, arrays, codec=CODEC)
        batch = LogBatch()
        batch.put_tail_ref(
            TailRef(
                TENANT, record.head_revision, start, len(ids) - start, coded.raw_bytes, coded.coded_bytes,
                kv_digest(arrays), "profile", turn + 1,
            )
        )  # fmt: skip
        older = [revision_id(session, t) for t in range(turn)]
        for name in older:
            batch.delete_tail_ref(TENANT, name)
        self.oracle.intend("tail", session, turn)
        self._records_then_reference(coded.records, batch)
        self.oracle.acknowledge("tail", session, turn)
        for name in older:
            self.store.blocks.delete_tails(TENANT, name).result()

    def _records_then_reference(self, records: list[tuple[bytes, bytes]], reference: LogBatch) -> None:
        self.store.blocks.write(records).result()
        self.store.log.write(reference).result()

    def _purge(self, session: int) -> None:
        try:
            record = self._session(session)
        except errors.SessionNotFound:
            return
        batch = LogBatch()
        revisions = self.store.log.revisions_of_session(TENANT, session_id(session))
        for revision in revisions:
            batch.delete_revision(TENANT, revision.revision_id)
        names = self.script.cells(self.script.history(session, TURNS - 1))
        for name in names:
            batch.delete_cell_ref(TENANT, name)
        batch.delete_requests(TENANT, session_id(session))
        batch.delete_session(TENANT, record.session_id)
        self._step(batch, "purge", session)
        self.store.catalog.remove_session(TENANT, record.session_id)
        for name in names:
            self.store.blocks.delete(KVOwner(TENANT, "cell", name)).result()
        for revision in revisions:
            self.store.blocks.delete_tails(TENANT, revision.revision_id).result()

    def _session(self, session: int) -> SessionRecord:
        return self.store.log.session(TENANT, session_id(session))

    def _step(self, batch: LogBatch, step: str, *what: int) -> None:
        self.oracle.intend(step, *what)
        self.store.log.write(batch).result()
        self.oracle.acknowledge(step, *what)


def session_record(session: int) -> SessionRecord:
    root = revision_id(session, -1)
    return SessionRecord(
        tenant=TENANT, session_id=session_id(session), head_revision=root, root_revision=root, model="fake", adapter="",
        identity_id=IDENTITY, policy={"name": "full"}, labels={"n": str(session)}, created_us=session,
        updated_us=session, last_used_us=session, ttl_us=None, expire_us=None, deleted_us=None, purge_us=None,
        generation=1, create_request_id=f"c{session}",
    )  # fmt: skip


def request_record(session: int, turn: int, state: str) -> RequestRecord:
    return RequestRecord(
        tenant=TENANT, session_id=session_id(session), request_id=request_id(session, turn), digest="d", state=state,
        base_revision="b", revision_id=revision_id(session, turn), params={"seed": turn}, created_us=turn,
        updated_us=turn,
    )  # fmt: skip


def revision_record(script: Script, session: int, turn: int, parent: str | None) -> RevisionRecord:
    said = script.said(session, turn)
    n = len(said.ids) if turn >= 0 else 0
    start = len(script.history(session, turn)) - n
    return RevisionRecord(
        tenant=TENANT, revision_id=revision_id(session, turn), session_id=session_id(session), parent=parent,
        kind="root" if turn < 0 else "turn", log_start=start, log_end=start + n, position_start=start,
        position_end=start + n, n_prompt=len(said.prompt), n_generated=len(said.generated), finish_reason="stop",
        aborted=False, created_us=turn + 1, request_id=request_id(session, turn), usage={},
    )  # fmt: skip
