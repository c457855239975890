"""Sessions of all tenants: open, list, change, lease, expire."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import structlog
from blake3 import blake3

from sessiond import admission
from sessiond.admission import TurnRequest
from sessiond.branch import read_branch
from sessiond.desk import Desk
from sessiond.diskuse import erase_session
from sessiond.errors import (
    BadRequest,
    DataLoss,
    Draining,
    EtagMismatch,
    IdentityMismatch,
    InvalidPageToken,
    ModelMissing,
    NotDeleted,
    RequestIdReused,
    RevisionNotFound,
    SessionBusy,
    SessionDeleted,
    SessionExists,
    SessionNotFound,
)
from sessiond.lifecycle import Event as Change
from sessiond.lifecycle import State
from sessiond.live import Live
from sessiond.messages import decode_messages, encode_messages
from sessiond.policies import registry
from sessiond.storage.batch import LogBatch
from sessiond.storage.catalog import Listed
from sessiond.storage.records import RevisionRecord, SessionRecord
from sessiond.template import Message
from sessiond.tiers import Restoration
from sessiond.views import NewSession, RevisionView, SessionView

log = structlog.get_logger()


class Sessions:
    """The domain's front door. Runs on the event loop; every method takes the caller's tenant first."""

    def __init__(self, desk: Desk, model_name: str, model_names: frozenset[str]) -> None:
        self.desk = desk
        self.model_name = model_name
        self.model_names = model_names
        self.draining = False

    # --- create, read, change ------------------------------------------------------------------------------------

    async def create(self, tenant: str, new: NewSession) -> SessionView:
        """Commit a root revision. The same request_id again returns the session it made."""
        self.refuse_draining()
        if new.model and new.model not in self.model_names:
            raise ModelMissing(f"this daemon serves {self.model_name}, not {new.model}", model=new.model)
        if new.adapter:
            raise ModelMissing("this daemon serves no adapters", adapter=new.adapter)
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
            extra={"ended": None, "computed": 0, "tools": list(new.tools)},
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
        record = self.record(tenant, session_id, deleted_too=True)
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
        """One page, newest first, and the token of the next page (empty at the end)."""
        size = _page_size(page_size)
        query = repr((tenant, sorted(labels.items()), state, hot))
        after = _parse_page_token(page_token, query) if page_token else None
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
        return views, _page_token(found[-1], query) if len(found) == size else ""

    async def update(self, tenant: str, session_id: str, etag: str, changes: dict[str, Any]) -> SessionView:
        """Set `labels`, `policy`, `ttl_us` or `expire_us`. Raises EtagMismatch if `etag` is given and old."""
        self.record(tenant, session_id)
        live = self.desk.live(tenant, session_id)
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
        record = self.record(tenant, session_id, deleted_too=True)
        live = self.desk.live(tenant, session_id)
        _check_etag(record, etag)
        refuse_busy(live)
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
                batch, before = LogBatch(), record.generation  # a purge in between is not undone
                if record.deleted_us is None:
                    record = replace(
                        record,
                        deleted_us=now,
                        purge_us=now + keep,
                        updated_us=now,
                        generation=record.generation + 1,
                    )
                batch.put_session(record, expect_generation=before)
                return batch

            record = await self.desk.edit(live, build)
            if live.state is State.COLD:
                live.advance(Change.DELETE)
        return self._view(record), 0

    async def undelete(self, tenant: str, session_id: str, etag: str) -> SessionView:
        """Bring a soft-deleted session back. Raises NotDeleted."""
        self.record(tenant, session_id, deleted_too=True)
        live = self.desk.live(tenant, session_id)
        now = self.desk.now_us()

        def build(record: SessionRecord) -> LogBatch:
            _check_etag(record, etag)
            if record.deleted_us is None:
                raise NotDeleted(f"session {session_id} is not deleted")
            batch = LogBatch()
            batch.put_session(
                replace(record, deleted_us=None, purge_us=None, updated_us=now, generation=record.generation + 1),
                expect_generation=record.generation,
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
        record = self.record(tenant, session_id, deleted_too=True)
        found = self.desk.store.log.revisions_of_session(tenant, session_id)
        start = 0
        if page_token:
            start = next((i + 1 for i, r in enumerate(found) if r.revision_id == page_token), -1)
            if start < 0:
                raise InvalidPageToken(f"page_token {page_token!r} is not one of this session's")
        size = _page_size(page_size)
        page = found[start : start + size]
        exact = (await self._exact_view(record)).exact_upto
        views = [self._revision_view(revision, exact) for revision in page]
        more = start + size < len(found)
        return views, page[-1].revision_id if more else ""

    async def revision(self, tenant: str, session_id: str, revision_id: str) -> RevisionView:
        record = self.record(tenant, session_id, deleted_too=True)
        found = self.desk.store.log.revision(tenant, revision_id)
        if found.session_id != session_id:
            raise RevisionNotFound(f"no revision {revision_id} in session {session_id}")
        return self._revision_view(found, (await self._exact_view(record)).exact_upto)

    def _revision_view(self, record: RevisionRecord, exact: int) -> RevisionView:
        asked, said = decode_messages(self.desk.store.log.messages(record.tenant, record.revision_id))
        return RevisionView(record, asked, said, min(exact, record.position_end))

    # --- memory --------------------------------------------------------------------------------------------------

    async def warm(self, tenant: str, session_id: str) -> tuple[SessionView, Restoration | None]:
        """Bring a session's KV into memory. Nothing to report if it is there."""
        self.refuse_draining()
        record = self.record(tenant, session_id)
        self.refuse_foreign(record)
        live = self.desk.live(tenant, session_id)
        refuse_busy(live)
        async with live.lease:
            record = self.record(tenant, session_id)
            live.load_history(self.desk.store.log, record.head_revision)
            report = None
            if live.cache is None:
                await self.desk.make_room(live, len(live.ids))
                report = await self.desk.warm(live)
                live.reserved = 0
            live.last_used = time.monotonic()
        return self._view(record), report

    async def suspend(self, tenant: str, session_id: str) -> tuple[SessionView, int, int]:
        """Push a session's KV to disk and out of memory. Raises SessionBusy while a turn runs."""
        record = self.record(tenant, session_id)
        live = self.desk.live(tenant, session_id)
        refuse_busy(live)
        written, freed = await self.desk.suspend(live)
        return await self._exact_view(record), written, freed

    async def count_tokens(
        self, tenant: str, session_id: str, messages: Sequence[Message], *, generation_prompt: bool
    ) -> tuple[int, int]:
        """Tokens these messages would append to the session, and tokens it holds."""
        record = self.record(tenant, session_id)
        self.refuse_foreign(record)
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

    # --- inside --------------------------------------------------------------------------------------------------

    def refuse_draining(self) -> None:
        if self.draining:
            raise Draining("the daemon is shutting down", retry_after=5.0)

    def refuse_foreign(self, record: SessionRecord) -> None:
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

    def record(self, tenant: str, session_id: str, *, deleted_too: bool = False) -> SessionRecord:
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
        count = self.desk.store.log.revision(record.tenant, record.head_revision).log_end
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
        # The index first: a death in between leaves a session to purge again, not one the log seems to have lost.
        await self.desk.in_sql(self.desk.store.catalog.remove_session, tenant, session_id)
        freed: int = await self.desk.in_pool(erase_session, self.desk.store, tenant, session_id)
        self.desk.lives.pop((tenant, session_id), None)
        return freed


def refuse_busy(live: Live) -> None:
    """Raises SessionBusy while a turn runs."""
    if live.turn:
        running = live.turn.plan.request.request_id
        raise SessionBusy(f"turn {running} is running", retry_after=1.0, request_id=running)


def _session_id(tenant: str, request_id: str) -> str:
    """A fresh id, or for a request_id always the same: creating twice then collides instead of making two."""
    if not request_id:
        return uuid.uuid4().hex
    return blake3(f"session\0{tenant}\0{request_id}".encode()).hexdigest(16)


def _check_etag(record: SessionRecord, etag: str) -> None:
    if etag and etag != str(record.generation):
        raise EtagMismatch(f"the session changed: etag is {record.generation}, not {etag}", etag=record.generation)


def _page_size(asked: int) -> int:
    """Raises BadRequest."""
    if asked < 0:
        raise BadRequest("page_size must not be negative", field="page_size")
    return min(asked or 100, 1000)


def _page_token(last: Listed, query: str) -> str:
    """Where a page ended, with a digest that ties it to its query."""
    place = f"{last.created_us}:{last.session_id}"
    return f"{place}:{blake3(f'{query}:{place}'.encode()).hexdigest(8)}"


def _parse_page_token(token: str, query: str) -> Listed:
    created, _, rest = token.partition(":")
    session_id = rest.partition(":")[0]
    place = Listed(int(created) if created.isascii() and created.isdigit() else 0, session_id)
    if _page_token(place, query) != token:
        raise InvalidPageToken("page_token was not issued by ListSessions for this query")
    return place
