"""Sessions of all tenants: open, list, change, lease, expire."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import structlog
from blake3 import blake3

from sessiond import admission
from sessiond.admission import TurnRequest
from sessiond.desk import Desk
from sessiond.errors import (
    BadRequest,
    DataLoss,
    Draining,
    EtagMismatch,
    IdentityMismatch,
    InvalidPageToken,
    NotDeleted,
    QueueFull,
    RequestIdReused,
    RevisionNotFound,
    SessionBusy,
    SessionDeleted,
    SessiondError,
    SessionExists,
    SessionNotFound,
)
from sessiond.lifecycle import Event as Change
from sessiond.lifecycle import State
from sessiond.live import Live
from sessiond.messages import decode_messages, encode_messages
from sessiond.policies import registry
from sessiond.sampling import Sampled, SamplingParams
from sessiond.storage.batch import LogBatch
from sessiond.storage.catalog import Listed
from sessiond.storage.records import RequestRecord, RevisionRecord, SessionRecord
from sessiond.template import Message
from sessiond.tiers import Restoration, read_branch
from sessiond.turn import Accepted as TurnAccepted
from sessiond.turn import Finished, Tokens, Turn, TurnEvent, discarded

log = structlog.get_logger()


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


class Sessions:
    """The domain's front door. Runs on the event loop; every method takes the caller's tenant first."""

    def __init__(self, desk: Desk, model_name: str, model_names: frozenset[str]) -> None:
        self.desk = desk
        self.model_name = model_name
        self.model_names = model_names
        self.draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    # --- create, read, change ------------------------------------------------------------------------------------

    async def create(self, tenant: str, new: NewSession) -> SessionView:
        """Commit a root revision. The same request_id again returns the session it made."""
        self._refuse_draining()
        if new.model and new.model not in self.model_names:
            raise IdentityMismatch(f"this daemon serves {self.model_name}, not {new.model}", field="model")
        if new.adapter:
            raise IdentityMismatch("this daemon serves no adapters", field="adapter")
        registry.parse(*new.policy)
        if new.messages and new.token_ids is not None:
            raise BadRequest("a session starts with messages or token_ids, not both", field="token_ids")
        desk, now = self.desk, self.desk.now_us()
        if new.token_ids is not None:
            admission.check_tokens(desk, new.token_ids)
            ids, flags = list(new.token_ids), [0] * len(new.token_ids)
        elif new.messages:
            delta = desk.template.render_root(new.messages, list(new.tools))
            ids, flags = list(delta.ids), list(delta.flags)
        else:
            ids, flags = [], []
        admission.refuse_overlong(desk, 0, len(ids), generates=True)
        session_id = _session_id(tenant, new.request_id)
        root = RevisionRecord(
            tenant=tenant,
            revision_id=uuid.uuid4().hex,
            session_id=session_id,
            parent=None,
            kind="root",
            log_start=0,
            log_end=len(ids),
            position_start=0,
            position_end=len(ids),
            n_prompt=len(ids),
            n_generated=0,
            finish_reason=None,
            aborted=False,
            created_us=now,
            request_id=new.request_id,
            usage={},
            extra={"ended": "closed", "computed": 0, "tools": list(new.tools)},
        )
        record = SessionRecord(
            tenant=tenant,
            session_id=session_id,
            head_revision=root.revision_id,
            root_revision=root.revision_id,
            model=self.model_name,
            adapter="",
            identity_id=desk.identity_id,
            policy={"name": new.policy[0], "knobs": new.policy[1]},
            labels=new.labels,
            created_us=now,
            updated_us=now,
            last_used_us=now,
            ttl_us=new.ttl_us,
            expire_us=now + new.ttl_us if new.ttl_us is not None else new.expire_us,
            deleted_us=None,
            purge_us=None,
            generation=1,
            create_request_id=new.request_id,
            seal=desk.settings.seal,
            extra={"digest": new.digest},
        )
        batch = LogBatch()
        if ids:
            batch.append_tokens(tenant, root.revision_id, 0, np.array(ids, np.uint32), np.array(flags, np.uint8))
        batch.put_revision(root, encode_messages(new.messages, ()))
        batch.put_session(record, expect_generation=0)
        try:
            await asyncio.wrap_future(desk.store.log.write(batch))
        except SessionExists:
            record = desk.store.log.session(tenant, session_id)
            if record.extra.get("digest") != new.digest:
                raise RequestIdReused(
                    f"request_id {new.request_id} made another session", request_id=new.request_id
                ) from None
        desk.index(record)
        return self._view(record)

    async def get(self, tenant: str, session_id: str) -> SessionView:
        """Also for a deleted session, until it is purged."""
        record = self._record(tenant, session_id, deleted_too=True)
        return await self._exact_view(record)

    async def page(
        self,
        tenant: str,
        *,
        labels: dict[str, str],
        state: str | None,
        hot: bool | None,
        page_size: int,
        page_token: str,
    ) -> tuple[list[SessionView], str]:
        """One page, oldest first, and the token of the next page (empty at the end)."""
        size = min(page_size or 100, 1000)
        after = _parse_page_token(page_token)
        found: list[Listed] = await self.desk.in_sql(
            lambda: self.desk.store.catalog.list_sessions(
                tenant, labels=labels, state=state, page_size=size, after=after
            )
        )
        views = []
        for listed in found:
            try:
                view = self._view(self.desk.store.log.session(tenant, listed.session_id))
            except SessionNotFound:
                continue  # purged since the index was read
            if hot is None or view.hot == hot:
                views.append(view)
        token = f"{found[-1].created_us}:{found[-1].session_id}" if len(found) == size else ""
        return views, token

    async def update(self, tenant: str, session_id: str, etag: str, changes: dict[str, Any]) -> SessionView:
        """Set `labels`, `policy`, `ttl_us` or `expire_us`. Raises EtagMismatch if `etag` is given and old."""
        live = self.desk.live(tenant, session_id)
        self._record(tenant, session_id)
        if "policy" in changes:
            registry.parse(changes["policy"]["name"], changes["policy"]["knobs"])
        now = self.desk.now_us()

        def build(record: SessionRecord) -> LogBatch:
            _check_etag(record, etag)
            after = replace(record, **changes, updated_us=now, generation=record.generation + 1)
            if changes.get("ttl_us") is not None:
                after = replace(after, expire_us=now + changes["ttl_us"])
            batch = LogBatch()
            batch.put_session(after, expect_generation=record.generation)
            return batch

        return self._view(await self.desk.edit(live, build))

    async def delete(
        self, tenant: str, session_id: str, etag: str, *, purge_now: bool
    ) -> tuple[SessionView | None, int]:
        """Soft delete: gone for turns, kept until purge_time. `purge_now` erases instead; returns the bytes freed."""
        live = self.desk.live(tenant, session_id)
        record = self._record(tenant, session_id, deleted_too=True)
        _check_etag(record, etag)
        if live.turn:
            live.turn.stop("discard")
        async with live.lease:
            await self.desk.unsettle(live)
            live.drop_cache()
            if purge_now:
                freed = await self._purge(tenant, session_id)
                return None, freed
            now = self.desk.now_us()
            keep = int(self.desk.settings.delete_retention_seconds * 1e6)

            def build(record: SessionRecord) -> LogBatch:
                _check_etag(record, etag)
                batch = LogBatch()
                if record.deleted_us is None:
                    record = replace(
                        record,
                        deleted_us=now,
                        purge_us=now + keep,
                        updated_us=now,
                        generation=record.generation + 1,
                    )
                batch.put_session(record)
                return batch

            record = await self.desk.edit(live, build)
            if live.state is State.COLD:
                live.advance(Change.DELETE)
        return self._view(record), 0

    async def undelete(self, tenant: str, session_id: str, etag: str) -> SessionView:
        """Bring a soft-deleted session back. Raises NotDeleted."""
        live = self.desk.live(tenant, session_id)
        now = self.desk.now_us()

        def build(record: SessionRecord) -> LogBatch:
            _check_etag(record, etag)
            if record.deleted_us is None:
                raise NotDeleted(f"session {session_id} is not deleted")
            batch = LogBatch()
            batch.put_session(
                replace(record, deleted_us=None, purge_us=None, updated_us=now, generation=record.generation + 1)
            )
            return batch

        record = await self.desk.edit(live, build)
        if live.state is State.DELETED:
            live.advance(Change.UNDELETE)
        return self._view(record)

    # --- revisions -----------------------------------------------------------------------------------------------

    async def revisions(
        self, tenant: str, session_id: str, page_size: int, page_token: str
    ) -> tuple[list[RevisionView], str]:
        """The session's revisions, oldest first."""
        record = self._record(tenant, session_id, deleted_too=True)
        found = self.desk.store.log.revisions_of_session(tenant, session_id)
        start = 0
        if page_token:
            start = next((i + 1 for i, r in enumerate(found) if r.revision_id == page_token), -1)
            if start < 0:
                raise InvalidPageToken(f"page_token {page_token!r} is not one of this session's")
        size = min(page_size or 100, 1000)
        page = found[start : start + size]
        exact = (await self._exact_view(record)).exact_upto
        views = [self._revision_view(revision, exact) for revision in page]
        more = start + size < len(found)
        return views, page[-1].revision_id if more else ""

    async def revision(self, tenant: str, session_id: str, revision_id: str) -> RevisionView:
        record = self._record(tenant, session_id, deleted_too=True)
        found = self.desk.store.log.revision(tenant, revision_id)
        if found.session_id != session_id:
            raise RevisionNotFound(f"no revision {revision_id} in session {session_id}")
        return self._revision_view(found, (await self._exact_view(record)).exact_upto)

    def _revision_view(self, record: RevisionRecord, exact: int) -> RevisionView:
        asked, said = decode_messages(self.desk.store.log.messages(record.tenant, record.revision_id))
        return RevisionView(record, asked, said, min(exact, record.position_end))

    # --- turns ---------------------------------------------------------------------------------------------------

    async def generate(self, tenant: str, request: TurnRequest) -> AsyncIterator[TurnEvent]:
        """Run, join, resume or replay the turn of `request.request_id`; see docs/api.md."""
        admission.check(self.desk, request)
        record = self._record(tenant, request.session_id, deleted_too=True)
        live = self.desk.live(tenant, request.session_id)
        while True:
            row = self.desk.store.log.request(tenant, request.session_id, request.request_id)
            if row and row.digest != request.digest:
                raise RequestIdReused(
                    f"request_id {request.request_id} belongs to a different request",
                    request_id=request.request_id,
                )
            if live.turn and live.turn.plan.request.request_id == request.request_id:
                turn, attachment = live.turn, "joined"
                break
            if row and row.state in ("finished", "aborted", "failed"):
                async for event in self._replay(row, request.resume_after):
                    yield event
                return
            self._refuse_draining()
            self._refuse_foreign(record)
            if live.lease.locked() and live.turn:
                if not request.wait:
                    raise SessionBusy(
                        f"turn {live.turn.plan.request.request_id} is running",
                        retry_after=1.0,
                        request_id=live.turn.plan.request.request_id,
                    )
                await live.turn.done()
                continue
            if len(self.desk.turns) >= self.desk.settings.max_queued_turns:
                raise QueueFull(f"{len(self.desk.turns)} turns are waiting", retry_after=1.0)
            await live.lease.acquire()
            try:
                turn = await self._start(tenant, live, request, row)
            except BaseException:
                live.lease.release()
                raise
            attachment = turn.plan.attachment
            break
        async for event in turn.events(request.resume_after, attachment):
            yield event

    async def _start(self, tenant: str, live: Live, request: TurnRequest, row: RequestRecord | None) -> Turn:
        """Plan and launch; on return the turn owns the lease."""
        await self.desk.unsettle(live)
        record = self._record(tenant, request.session_id)
        open_id = record.extra.get("open_request")
        if open_id and open_id != request.request_id:
            other = self.desk.store.log.request(tenant, request.session_id, open_id)
            if other and not request.supersede:
                raise self.desk.suspended_error(other)
            if other:
                now = self.desk.now_us()
                record = await self.desk.edit(live, lambda current: discarded(current, other, now))
                if live.cache:
                    live.cache.truncate(len(live.ids), self.desk.store.cell_tokens)
        live.load_history(self.desk.store.log, record.head_revision)
        if row:
            plan = admission.resume_turn(self.desk, record, row)
        else:
            plan = admission.plan_turn(self.desk, live, record, request)
        turn = Turn(self.desk, live, plan)
        live.turn = turn
        task = asyncio.create_task(self._run(live, turn))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return turn

    async def _run(self, live: Live, turn: Turn) -> None:
        try:
            await turn.run()
        finally:
            live.turn = None
            live.last_used = time.monotonic()
            self.desk.settle(live)
            live.lease.release()

    async def _replay(self, row: RequestRecord, resume_after: int) -> AsyncIterator[TurnEvent]:
        """The events of a turn that has ended, from the log. Logprobs are not kept."""
        done = row.finished or {}
        if "error" in done:
            raise _error_of(done["error"])
        finished = Finished.from_json(done)
        usage = finished.usage
        yield TurnAccepted(
            base_revision=row.base_revision,
            turn_revision=row.revision_id,
            new=usage.get("new", 0),
            reused=usage.get("reused", 0),
            drift=bool(row.params["drift"]),
            attachment="replayed",
            log_start=0,
        )
        if finished.revision:
            ids, _ = self.desk.store.log.tokens(row.tenant, row.revision_id)
            for tokens in replay_tokens(self.desk, row, ids[int(row.params["n_prompt"]) :].tolist()):
                if tokens.first_index >= resume_after:
                    yield tokens
        yield finished

    async def abort(self, tenant: str, session_id: str, request_id: str, *, commit: bool) -> tuple[bool, str, int]:
        """Stop a running or suspended turn. Idempotent: (stopped now, revision if committed, generated tokens)."""
        record = self._record(tenant, session_id, deleted_too=True)
        live = self.desk.live(tenant, session_id)
        turn = live.turn
        if turn and request_id in ("", turn.plan.request.request_id):
            turn.stop("commit" if commit else "discard")
            await turn.done()
            return True, turn.finished.revision if turn.finished else "", len(turn.generated)
        row = self.desk.store.log.request(tenant, session_id, request_id or record.extra.get("open_request", "-"))
        if row is None or row.state not in ("running", "suspended"):
            finished = (row.finished or {}) if row else {}
            return False, str(finished.get("revision", "")), int(finished.get("committed", 0))
        async with live.lease:
            await self.desk.unsettle(live)
            ids, _ = self.desk.store.log.tokens(tenant, row.revision_id)
            count = len(ids) - int(row.params["n_prompt"])
            if commit:
                live.load_history(self.desk.store.log, record.head_revision)
                turn = Turn(self.desk, live, admission.resume_turn(self.desk, record, row))
                await turn.commit_aborted()
                return True, turn.turn_id, count
            now = self.desk.now_us()
            await self.desk.edit(live, lambda current: discarded(current, row, now))
            if live.cache:
                live.cache.truncate(len(live.ids), self.desk.store.cell_tokens)
        return True, "", count

    # --- memory --------------------------------------------------------------------------------------------------

    async def warm(self, tenant: str, session_id: str) -> tuple[SessionView, Restoration | None]:
        """Bring a session's KV into memory. Nothing to report if it is there."""
        self._refuse_draining()
        record = self._record(tenant, session_id)
        self._refuse_foreign(record)
        live = self.desk.live(tenant, session_id)
        async with live.lease:
            record = self._record(tenant, session_id)
            live.load_history(self.desk.store.log, record.head_revision)
            report = None if live.cache else await self.desk.warm(live)
            live.last_used = time.monotonic()
        return self._view(record), report

    async def suspend(self, tenant: str, session_id: str) -> tuple[SessionView, int, int]:
        """Push a session's KV to disk and out of memory, after its running turn if there is one."""
        record = self._record(tenant, session_id)
        written, freed = await self.desk.suspend(self.desk.live(tenant, session_id))
        return await self._exact_view(record), written, freed

    async def count_tokens(
        self, tenant: str, session_id: str, messages: Sequence[Message], *, generation_prompt: bool
    ) -> tuple[int, int]:
        """Tokens these messages would append to the session, and tokens it holds."""
        record = self._record(tenant, session_id)
        live = Live(tenant, session_id)
        live.load_history(self.desk.store.log, record.head_revision)
        request = TurnRequest(
            session_id,
            "count",
            "",
            mode=admission.NEW_INPUT if generation_prompt else admission.APPEND_ONLY,
            messages=tuple(messages),
        )
        admission.check(self.desk, request)
        return len(admission.render(self.desk, live, request)[0]), len(live.ids)

    async def sweep(self) -> None:
        """Delete expired sessions, purge deleted ones, let idle ones leave memory. Runs until cancelled."""
        while True:
            await asyncio.sleep(self.desk.settings.sweep_seconds)
            try:
                await self._sweep_once()
            except SessiondError as error:
                log.error("sweep failed", error=error.message)

    async def _sweep_once(self) -> None:
        due = await self.desk.in_sql(self.desk.store.catalog.due, self.desk.now_us())
        for key in due.expired:
            await self.delete(key.tenant, key.session_id, "", purge_now=False)
        for key in due.purgeable:
            await self.delete(key.tenant, key.session_id, "", purge_now=True)
        horizon = time.monotonic() - self.desk.settings.idle_seconds
        for live in list(self.desk.lives.values()):
            if live.lease.locked() or live.last_used > horizon:
                continue
            if live.cache:
                await self.desk.suspend(live)
            if not live.lease.locked():
                self.desk.lives.pop((live.tenant, live.session_id), None)

    async def drain(self, seconds: float) -> None:
        """Refuse new turns, let running ones end (suspend them after `seconds`), and persist what is hot."""
        self.draining = True
        turns = list(self.desk.turns.values())
        if turns:
            _, late = await asyncio.wait([asyncio.create_task(turn.done()) for turn in turns], timeout=seconds)
            if late:
                for turn in turns:
                    turn.stop("suspend")
                await asyncio.wait(late)
        for live in list(self.desk.lives.values()):
            if live.cache:
                await self.desk.suspend(live)

    # --- inside --------------------------------------------------------------------------------------------------

    def _refuse_draining(self) -> None:
        if self.draining:
            raise Draining("the daemon is shutting down", retry_after=5.0)

    def _refuse_foreign(self, record: SessionRecord) -> None:
        """KV and tokens belong to one identity."""
        if record.identity_id == self.desk.identity_id:
            return
        theirs = self.desk.store.log.identity(record.identity_id) or {}
        ours = self.desk.store.log.identity(self.desk.identity_id) or {}
        differing = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k)) or ["identity_id"]
        raise IdentityMismatch(
            f"session {record.session_id} belongs to another model; {', '.join(differing)} differ",
            field=",".join(differing),
        )

    def _record(self, tenant: str, session_id: str, *, deleted_too: bool = False) -> SessionRecord:
        if not session_id:
            raise BadRequest("session_id is required", field="session_id")
        if (tenant, session_id) in {(k.tenant, k.session_id) for k in self.desk.store.lost}:
            raise DataLoss(f"session {session_id} is in the catalog but not in the log", session_id=session_id)
        record = self.desk.store.log.session(tenant, session_id)
        if record.deleted_us is not None and not deleted_too:
            raise SessionDeleted(f"session {session_id} is deleted; UndeleteSession brings it back")
        return record

    def _view(self, record: SessionRecord) -> SessionView:
        """What is known without reading the history."""
        live = self.desk.lives.get((record.tenant, record.session_id))
        cache = live.cache if live else None
        running = live.turn.plan.request.request_id if live and live.turn else ""
        open_id = str(record.extra.get("open_request", ""))
        return SessionView(
            record=record,
            hot=cache is not None,
            token_count=self.desk.store.log.revision(record.tenant, record.head_revision).log_end,
            exact_upto=cache.sealed if cache else 0,
            persisted_upto=live.persisted if live and cache else 0,
            bytes_hot=cache.nbytes if cache else 0,
            running_request=running,
            suspended_request=open_id if open_id != running else "",
        )

    async def _exact_view(self, record: SessionRecord) -> SessionView:
        """As `_view`; for a cold session also how much of it is sealed and on disk."""
        view = self._view(record)
        if view.hot:
            return view
        chain, ids = await self.desk.in_pool(read_branch, self.desk.store.log, record.tenant, record.head_revision)
        sealed, persisted = await self.desk.in_pool(self.desk.tiers.persisted_upto, record.tenant, chain, ids)
        return replace(view, exact_upto=sealed, persisted_upto=persisted)

    async def _purge(self, tenant: str, session_id: str) -> int:
        """Erase a session: its records, and all KV that no other session of the tenant uses."""
        freed: int = await self.desk.in_pool(self.desk.tiers.erase, tenant, session_id)
        await self.desk.in_sql(self.desk.store.catalog.remove_session, tenant, session_id)
        self.desk.lives.pop((tenant, session_id), None)
        return freed


def _session_id(tenant: str, request_id: str) -> str:
    """A fresh id, or for a request_id always the same: creating twice then collides instead of making two."""
    if not request_id:
        return uuid.uuid4().hex
    return blake3(f"session\0{tenant}\0{request_id}".encode()).hexdigest(16)


def _check_etag(record: SessionRecord, etag: str) -> None:
    if etag and etag != str(record.generation):
        raise EtagMismatch(f"the session changed: etag is {record.generation}, not {etag}", etag=record.generation)


def _parse_page_token(token: str) -> Listed | None:
    if not token:
        return None
    created, _, session_id = token.partition(":")
    if not created.isdigit() or not session_id:
        raise InvalidPageToken(f"page_token {token!r} was not issued by ListSessions")
    return Listed(created_us=int(created), session_id=session_id)


def replay_tokens(desk: Desk, row: RequestRecord, generated: list[int]) -> list[Tokens]:
    """A committed turn's generated ids, each with the text it completes."""
    sampling = SamplingParams.from_json(row.params["sampling"])
    stops = desk.stop_ids | frozenset(sampling.stop_token_ids)
    stream = desk.new_stream()
    out: list[Tokens] = []
    for index, token in enumerate(generated):
        delta = stream.flush() if token in stops and index == len(generated) - 1 else stream.push(token)
        out.append(Tokens(index, delta.byte_offset, (Sampled(token),), delta.text))
    if out and (rest := stream.flush().text):
        out[-1] = replace(out[-1], text=out[-1].text + rest)
    return out


def _error_of(told: dict[str, str]) -> SessiondError:
    """The error that a failed turn ended with, for its replay."""
    kinds = {SessiondError.reason: SessiondError}
    stack = [SessiondError]
    while stack:
        for kind in stack.pop().__subclasses__():
            kinds[kind.reason] = kind
            stack.append(kind)
    return kinds.get(told["reason"], SessiondError)(told["message"])
