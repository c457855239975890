"""A session as an archive: what goes in, and its bytes as they are made, with one block in memory at a time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import structlog

from sessiond.desk import Desk
from sessiond.errors import DataLoss, RecordCorrupt, ResourceExhausted, StoreReadOnly
from sessiond.history import History, read_history
from sessiond.live import Live
from sessiond.manifest import Manifest, encode_manifest
from sessiond.places import ArchivePlaces
from sessiond.segments import Run, plan_runs
from sessiond.sessions import Sessions
from sessiond.storage.archive import ArchiveWriter
from sessiond.storage.kv import kv_digest
from sessiond.storage.records import SessionRecord
from sessiond.storage.tensors import encode_tensors
from sessiond.tree import find_revision
from sessiond.types import Part
from sessiond.v1 import archive_pb2

log = structlog.get_logger()

CHUNK_BYTES = 1 << 20
PERSIST_PATIENCE_S = 2.0  # for whoever holds the session, which may be a turn


@dataclass(slots=True)
class Export:
    """An archive about to be streamed. `chunks` once; then `sha256` and `total_bytes` are those of all of them."""

    desk: Desk
    session: SessionRecord
    identity: dict[str, str]
    history: History
    manifest: bytes
    runs: list[Run]
    sha256: bytes = b""
    total_bytes: int = 0
    _broken: set[int] = field(default_factory=set)

    @property
    def tokens_with_kv(self) -> int:
        """Tokens of the head's branch whose KV is planned to come along."""
        on_branch = set(self.history.chain(self.history.head))
        return max((run.end for run in self.runs if run.revision in on_branch), default=0)

    @property
    def estimated_bytes(self) -> int:
        return len(self.manifest) + sum(run.raw_bytes for run in self.runs)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The archive's bytes, each chunk but the last of 1 MiB."""
        digest = hashlib.sha256()
        waiting = bytearray()
        pieces = self._pieces()
        while (piece := await self.desk.in_pool(next, pieces, None)) is not None:
            waiting += piece
            while len(waiting) >= CHUNK_BYTES:
                chunk = bytes(waiting[:CHUNK_BYTES])
                del waiting[:CHUNK_BYTES]
                digest.update(chunk)
                self.total_bytes += len(chunk)
                yield chunk
        digest.update(waiting)
        self.total_bytes += len(waiting)
        self.sha256 = digest.digest()
        yield bytes(waiting)

    def _pieces(self) -> Iterator[bytes]:
        writer = ArchiveWriter()
        yield writer.begin(self.manifest)
        for run in self.runs:
            block = self._block(run)
            if block:
                yield writer.block(*block)
        yield writer.end()

    def _block(self, run: Run) -> tuple[bytes, bytes] | None:
        """Header and blob; None for a run that cannot be read, and for all that build on it."""
        if run.after in self._broken or run.revision in self._broken:
            self._broken.add(run.revision)
            return None
        blocks = self.desk.store.blocks
        try:
            n_layers, heads, size, itemsize = blocks.shape(run.owner, run.record_start)
            arrays = np.empty((n_layers, 2, heads, run.n_record, size), f"<u{itemsize}")

            def out(layer: int, part: Part) -> np.ndarray[Any, Any]:
                view: np.ndarray[Any, Any] = arrays[layer, int(part)]
                return view

            blocks.read_into(run.owner, run.record_start, run.n_record, n_layers, out)
        except RecordCorrupt as error:  # damaged, or dropped since: computed again after import
            log.warning("KV left out of an archive", session=self.session.session_id, error=error.message)
            self._broken.add(run.revision)
            return None
        kept = arrays[:, :, :, run.start - run.record_start :]
        pairs = [(layer[0], layer[1]) for layer in kept]
        header = archive_pb2.ArchiveBlock(
            revision=run.revision,
            start=run.start,
            n_tokens=run.end - run.start,
            sealed=run.sealed,
            profile=run.profile,
            kv_digest=kv_digest(pairs),
        )
        return header.SerializeToString(deterministic=True), encode_tensors(pairs, self.identity["kv_dtype"])


class Exports:
    """What ExportSession does. Runs on the event loop; no more than a few at a time."""

    def __init__(self, sessions: Sessions, places: ArchivePlaces) -> None:
        self.sessions = sessions
        self.desk = sessions.desk
        self._places = places

    @contextlib.asynccontextmanager
    async def open(
        self, tenant: str, session_id: str, revision_id: str, *, all_revisions: bool, tokens_only: bool
    ) -> AsyncIterator[Export]:
        """Everything that can be refused is refused here, before the first byte.

        Raises SessionNotFound, RevisionNotFound, RecordCorrupt (with what is still readable), QueueFull.
        """
        desk = self.desk
        record = self.sessions.record(tenant, session_id, deleted_too=True)
        with self._places.place(tenant):
            if not tokens_only:
                await self._persist(desk.lives.get((tenant, session_id)))
                record = self.sessions.record(tenant, session_id, deleted_too=True)
            yield await desk.in_pool(_prepare, desk, record, revision_id, all_revisions, tokens_only)

    async def _persist(self, live: Live | None) -> None:
        """Write what is only in memory, where that can be done; the cache stays."""
        if live is None or live.cache is None or live.turn is not None:
            return
        try:
            async with asyncio.timeout(PERSIST_PATIENCE_S):
                await live.lease.acquire()
        except TimeoutError:
            return
        try:
            await self.desk.unsettle(live)
            if live.cache is not None:
                await self.desk.persist(live)
        except (ResourceExhausted, StoreReadOnly) as error:
            log.warning("exporting what is on disk already", session=live.session_id, error=error.message)
        finally:
            if live.cache is not None:
                self.desk.settle(live)
            live.lease.release()


def _prepare(desk: Desk, record: SessionRecord, revision_id: str, all_revisions: bool, tokens_only: bool) -> Export:
    log_store = desk.store.log
    identity = log_store.identity(record.identity_id)
    if identity is None:
        raise DataLoss(f"identity {record.identity_id} of session {record.session_id} is not in the log")
    head = find_revision(log_store, record, revision_id or record.head_revision)
    history, records = read_history(log_store, record, head, whole_tree=all_revisions)
    profiles: list[str] = []
    runs = [] if tokens_only else plan_runs(desk.store, record, history, records, profiles)
    told = [log_store.profile(profile_id) or {"profile_id": profile_id} for profile_id in profiles]
    manifest = Manifest(
        created_by=f"sessiond {version('sessiond')}",
        created_us=desk.now_us(),
        session_id=record.session_id,
        identity={name: str(value) for name, value in identity.items()},
        model=record.model,
        adapter=record.adapter,
        policy=(str(record.policy["name"]), dict(record.policy["knobs"])),
        cell_tokens=desk.store.cell_tokens,
        profiles=tuple({name: str(value) for name, value in fields.items()} for fields in told),
        history=history,
    )
    return Export(desk, record, manifest.identity, history, encode_manifest(manifest), runs)
