"""An archive as a new session: received, verified as a whole, judged, and only then written."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import structlog
from blake3 import blake3

from sessiond.desk import Desk
from sessiond.errors import BadRequest, IdentityMismatch, SessionExists
from sessiond.foreignkv import ForeignKV, TailWriter, check_blocks
from sessiond.history import History
from sessiond.manifest import Manifest, decode_manifest
from sessiond.modelidentity import differing_fields, profile_id
from sessiond.newsession import made_before
from sessiond.places import ArchivePlaces
from sessiond.retelling import TOKENIZER, retell, untellable
from sessiond.sessions import Sessions
from sessiond.storage.archive import ArchiveReader, corrupt
from sessiond.storage.environment import DEFAULT_RESERVE_BYTES
from sessiond.storage.incoming import Incoming
from sessiond.storage.kv import KVOwner
from sessiond.storage.records import SessionRecord
from sessiond.transplant import check_fits, transplant
from sessiond.views import ImportRequest, NewSession, SessionView, session_view

log = structlog.get_logger()

Verdict = Literal["exact", "recompute", "refused"]
MAX_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did. `session` is None after a dry run."""

    session: SessionView | None
    verdict: Verdict
    fields: list[str]
    tokens: int
    with_kv: int


@dataclass(slots=True)
class Upload:
    """The chunks of an import, on disk as they come."""

    file: Incoming
    _sha256: Any = field(default_factory=hashlib.sha256)

    def append(self, chunk: bytes) -> None:
        """Raises BadRequest for a chunk that is too large, DiskFull or StoreReadOnly."""
        if len(chunk) > MAX_CHUNK_BYTES:
            raise BadRequest(f"a chunk has at most {MAX_CHUNK_BYTES} bytes, not {len(chunk)}", field="chunk")
        self._sha256.update(chunk)
        self.file.append(chunk)

    def check(self, sha256: bytes, total_bytes: int) -> None:
        """Raises RecordCorrupt unless the trailer fits what came."""
        if (total_bytes, sha256) != (self.file.size, self._sha256.digest()):
            raise corrupt(f"{self.file.size} bytes came, and their hash or number is not the trailer's")


class Imports:
    """What ImportSession does. Runs on the event loop; no more than a few at a time."""

    def __init__(self, sessions: Sessions, places: ArchivePlaces) -> None:
        self.sessions = sessions
        self.desk = sessions.desk
        self._places = places

    async def receive(
        self, tenant: str, asked: ImportRequest, chunks: AsyncIterator[bytes | tuple[bytes, int]]
    ) -> Imported:
        """Take in the chunks and, last, the trailer (hash, length); then make the session.

        Raises everything that sessions.proto lists for ImportSession. Nothing is left of an import that fails.
        """
        self.sessions.refuse_draining()
        with self._places.place(tenant):
            desk = self.desk
            with await desk.in_pool(Incoming, desk.store.root, DEFAULT_RESERVE_BYTES) as file:
                upload, whole = Upload(file), False
                async for part in self._places.prompt(chunks):
                    if whole:
                        raise BadRequest("something follows the trailer", field="part")
                    if isinstance(part, bytes):
                        await desk.in_pool(upload.append, part)
                    else:
                        upload.check(*part)
                        whole = True
                if not whole:
                    raise BadRequest("the stream ended before its trailer", field="trailer")
                self.sessions.refuse_draining()
                record, done = await desk.whole(asyncio.to_thread(self._make, tenant, asked, file))
        if record is None:
            return done
        desk.index(record)
        return replace(done, session=session_view(desk, record))

    def _make(self, tenant: str, asked: ImportRequest, file: Incoming) -> tuple[SessionRecord | None, Imported]:
        """Verify, judge, write. Blocks."""
        desk = self.desk
        reader = ArchiveReader(file)
        digest = blake3(asked.digest.encode() + reader.digest).hexdigest(16)
        # Before anything is judged: what the request made stays its answer, whatever model is served by now.
        known = None if asked.dry_run else made_before(desk.store.log, tenant, asked.request_id, digest)
        if known is not None:
            return known, _as_told(known)
        manifest = decode_manifest(reader.manifest)
        ours = desk.store.log.identity(desk.identity_id) or {}
        fields = differing_fields(manifest.identity, ours)
        shape = None if fields else desk.tiers.shape
        found = check_blocks(reader, manifest.history, len(manifest.profiles), shape)
        desk.check_policy(*manifest.policy)
        verdict, history = _judge(desk, asked, manifest, ours, fields)
        with_kv = found.covered(history, history.head) if verdict == "exact" else 0
        done = Imported(None, verdict, fields, manifest.history.n_tokens, with_kv)
        if asked.dry_run:
            return None, done
        desk.store.require_space()
        return self._write(tenant, asked, digest, _Judged(reader, manifest, history, found, done)), done

    def _write(self, tenant: str, asked: ImportRequest, digest: str, judged: _Judged) -> SessionRecord:
        desk, done = self.desk, judged.done
        new = NewSession(
            request_id=asked.request_id,
            digest=digest,
            policy=judged.manifest.policy,
            labels=asked.labels,
            ttl_us=asked.ttl_us,
            expire_us=asked.expire_us,
        )
        told = {"verdict": done.verdict, "fields": done.fields, "tokens": done.tokens, "with_kv": done.with_kv}
        name = self.sessions.model_name
        record, revisions, batch = transplant(desk, tenant, judged.history, new, name, {"imported": told})
        profiles = {profile_id(fields): dict(fields) for fields in judged.manifest.profiles}
        fit = judged.manifest.cell_tokens == desk.store.cell_tokens
        names = [profile_id(fields) for fields in judged.manifest.profiles]
        writer = TailWriter(desk.tiers, tenant, judged.reader, names, cells_fit=fit)
        owners = [KVOwner(tenant, "tail", revision.revision_id.encode()) for revision in revisions]
        with desk.store.inflight.hold(owner.name for owner in owners):  # nothing refers to the KV yet
            try:
                if done.verdict == "exact":
                    for ref in writer.write(judged.found, judged.history, revisions):
                        batch.put_tail_ref(ref)
                    for profile, fields in profiles.items():
                        batch.put_profile(profile, fields)
                desk.store.log.write(batch).result()
            except SessionExists:  # the same request, at the same time
                writer.remove()
                known = made_before(desk.store.log, tenant, asked.request_id, digest)
                assert known is not None, "only a request_id makes a session's id collide"
                return known
            except BaseException:
                _take_back(writer)
                raise
        return record


@dataclass(frozen=True, slots=True)
class _Judged:
    """An archive that was verified, and what is to be made of it."""

    reader: ArchiveReader
    manifest: Manifest
    history: History
    found: ForeignKV
    done: Imported


def _judge(
    desk: Desk, asked: ImportRequest, manifest: Manifest, ours: dict[str, Any], fields: list[str]
) -> tuple[Verdict, History]:
    """The verdict, and the history as this model takes it. Raises IdentityMismatch unless `dry_run`."""
    history = manifest.history
    if not fields:
        check_fits(desk, history)
        return "exact", history
    stuck = untellable(history) if TOKENIZER in fields else None
    if stuck is not None and asked.dry_run:
        return "refused", history
    if asked.dry_run or (asked.allow_recompute and stuck is None):
        return "recompute", retell(desk, history, manifest.identity, ours)
    if stuck is None:
        help_ = "allow_recompute takes its messages"
    else:
        help_ = f"revision {stuck} was given as token ids, which mean nothing to another tokenizer"
    raise IdentityMismatch(
        f"the archive belongs to another model; {', '.join(fields)} differ; {help_}", field=",".join(fields)
    )


def _as_told(record: SessionRecord) -> Imported:
    told = record.extra["imported"]
    return Imported(None, told["verdict"], list(told["fields"]), int(told["tokens"]), int(told["with_kv"]))


def _take_back(writer: TailWriter) -> None:
    """Nothing refers to it: what cannot be removed now is garbage, and collected as such."""
    try:
        writer.remove()
    except Exception as error:  # noqa: BLE001 - the import's own error is the one to tell
        log.warning("KV of a failed import stays until it is collected", error=str(error))
