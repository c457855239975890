"""Sessions of all tenants: open, list, change, lease, expire."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import structlog

from sessiond import admission
from sessiond.admission import TurnRequest
from sessiond.desk import Desk
from sessiond.erasure import erase_session
from sessiond.errors import (
    BadRequest,
    DataLoss,
    Draining,
    EtagMismatch,
    IdentityMismatch,
    InvalidPageToken,
    ModelMissing,
    NotDeleted,
    RecordCorrupt,
    RevisionNotFound,
    SessionBusy,
    SessionDeleted,
    SessionExists,
    SessionNotFound,
)
from sessiond.lifecycle import Event as Change
from sessiond.lifecycle import State
from sessiond.live import Live
from sessiond.modelidentity import differing_fields
from sessiond.newsession import begin_session, made_before
from sessiond.paging import format_page_token, page_length, parse_page_token
from sessiond.restoring import Restoration
from sessiond.storage.batch import LogBatch
from sessiond.storage.catalog import Listed
from sessiond.storage.records import RevisionRecord, SessionRecord
from sessiond.template import Message
from sessiond.tree import Tree, find_revision, read_tree, shared_upto
from sessiond.views import NewSession, RevisionView, SessionView, exact_view, revision_view, session_view

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
        self.refuse_absent_model(new.model, new.adapter)
        self.desk.check_policy(*new.policy)
        if new.messages and new.token_ids is not None:
            raise BadRequest("a session starts with messages or token_ids, not both", field="token_ids")
        desk = self.desk
        record, batch = begin_session(desk, tenant, new, self.model_name)
        if not desk.store.log.has_session(tenant, record.session_id):
            desk.store.require_space()
        try:
            await asyncio.wrap_future(desk.store.log.write(batch))
        except SessionExists:
            made = made_before(desk.store.log, tenant, new.request_id, new.digest)
            record = made or desk.store.log.session(tenant, record.session_id)
        desk.index(record)
        return session_view(desk, record)

    async def get(self, tenant: str, session_id: str) -> SessionView:
        """Also for a deleted session, until it is purged."""
        record = self.record(tenant, session_id, deleted_too=True)
        return await exact_view(self.desk, record)

    async def page(
        self,
        tenant: str,
        *,
        labels: dict[str, str],
        state: str | None,
        tier: str | None,
        page_size: int,
        page_token: str,
    ) -> tuple[list[SessionView], str]:
        """One page, newest first, and the token of the next page (empty at the end)."""
        size = page_length(page_size)
        query = repr((tenant, sorted(labels.items()), state, tier))
        after = parse_page_token(page_token, query) if page_token else None
        found: list[Listed] = await self.desk.in_sql(
            lambda: self.desk.store.catalog.list_sessions(
                tenant, labels=labels, state=state, page_size=size, after=after
            )
        )
        views = []
        for listed in found:
            try:
                view = session_view(self.desk, self.desk.store.log.session(tenant, listed.session_id))
            except SessionNotFound:
                continue  # purged since the index was read
            except (RecordCorrupt, RevisionNotFound) as error:
                log.error("damaged session not listed", session=listed.session_id, error=error.message)
                continue
            if tier in (None, "hot" if view.hot else "cold"):  # nothing is warm yet
                views.append(view)
        return views, format_page_token(found[-1], query) if len(found) == size else ""

    async def update(self, tenant: str, session_id: str, etag: str, changes: dict[str, Any]) -> SessionView:
        """Set `labels`, `policy`, `ttl_us` or `expire_us`. Raises EtagMismatch if `etag` is given and old."""
        self.record(tenant, session_id)
        live = self.desk.live(tenant, session_id)
        if "policy" in changes:
            self.desk.check_policy(changes["policy"]["name"], changes["policy"]["knobs"])
        now = self.desk.now_us()

        def build(record: SessionRecord) -> LogBatch:
            check_etag(record, etag)
            after = replace(record, **changes, updated_us=now, generation=record.generation + 1)
            if changes.get("ttl_us") is not None:
                after = replace(after, expire_us=now + changes["ttl_us"])
            batch = LogBatch()
            batch.put_session(after, expect_generation=record.generation)
            return batch

        return session_view(self.desk, await self.desk.edit(live, build))

    async def delete(
        self, tenant: str, session_id: str, etag: str, *, purge_now: bool
    ) -> tuple[SessionView | None, int]:
        """Soft delete: gone for turns, kept until purge_time. `purge_now` erases instead; returns the bytes freed.

        A damaged session can only be erased, and not with an etag.
        """
        if etag or not (purge_now and session_id and self._is_damaged(tenant, session_id)):
            check_etag(self.record(tenant, session_id, deleted_too=True), etag)
        live = self.desk.live(tenant, session_id)
        refuse_busy(live)
        async with live.lease:
            await self.desk.unsettle(live)
            live.drop_cache()
            if purge_now:
                freed = await self._purge(tenant, session_id)
                return None, freed

            def wanted(record: SessionRecord) -> bool:
                check_etag(record, etag)
                return True

            record = await self._soft_delete(live, wanted)
        return session_view(self.desk, record), 0

    async def expire_due(self, tenant: str, session_id: str) -> None:
        """Soft-delete what the index calls expired. If the log's record is not, only the index is put right."""

        async def delete(live: Live) -> None:
            await self._soft_delete(live, lambda record: _expired(record, self.desk.now_us()))

        await self._if_due(tenant, session_id, _expired, delete)

    async def purge_due(self, tenant: str, session_id: str) -> None:
        """Erase what the index calls purgeable. If the log's record is not, only the index is put right."""

        async def purge(live: Live) -> None:
            await self._purge(tenant, session_id)

        await self._if_due(tenant, session_id, _purgeable, purge)

    async def purge_deleted(self, tenant: str, session_id: str) -> None:
        """Erase a soft-deleted session before its time. One that is in use, or not deleted, is left."""

        async def purge(live: Live) -> None:
            await self._purge(tenant, session_id)

        await self._if_due(tenant, session_id, lambda record, _: record.deleted_us is not None, purge)

    async def _if_due(
        self,
        tenant: str,
        session_id: str,
        due: Callable[[SessionRecord, int], bool],
        act: Callable[[Live], Awaitable[None]],
    ) -> None:
        """Take the session out of memory and `act`, under its lease; a session in use is left to the next sweep."""
        live = self.desk.live(tenant, session_id)
        if live.turn or live.lease.locked():
            return
        async with live.lease:
            record = self.record(tenant, session_id, deleted_too=True)
            if not due(record, self.desk.now_us()):
                self.desk.index(record)
                return
            await self.desk.unsettle(live)
            live.drop_cache()
            await act(live)

    async def _soft_delete(self, live: Live, wanted: Callable[[SessionRecord], bool]) -> SessionRecord:
        """Mark a session deleted if its record, read just before it is written, is still `wanted` to be."""
        now = self.desk.now_us()
        keep = int(self.desk.settings.delete_retention_seconds * 1e6)

        def build(record: SessionRecord) -> LogBatch:
            batch, before = LogBatch(), record.generation  # a purge in between is not undone
            if wanted(record) and record.deleted_us is None:
                record = replace(
                    record, deleted_us=now, purge_us=now + keep, updated_us=now, generation=record.generation + 1
                )
            batch.put_session(record, expect_generation=before)
            batch.frees = True  # the first step to more space: let through below the reserve
            return batch

        record = await self.desk.edit(live, build)
        if record.deleted_us is not None:
            self.desk.explanations.forget(live.tenant, live.session_id)
        if record.deleted_us is not None and live.state is State.COLD:
            live.advance(Change.DELETE)
        return record

    async def undelete(self, tenant: str, session_id: str, etag: str) -> SessionView:
        """Bring a soft-deleted session back. Raises NotDeleted."""
        self.record(tenant, session_id, deleted_too=True)
        live = self.desk.live(tenant, session_id)
        now = self.desk.now_us()

        def build(record: SessionRecord) -> LogBatch:
            check_etag(record, etag)
            if record.deleted_us is None:
                raise NotDeleted(f"session {session_id} is not deleted")
            batch = LogBatch()
            batch.put_session(
                replace(record, deleted_us=None, purge_us=None, updated_us=now, generation=record.generation + 1),
                expect_generation=record.generation,
            )
            return batch

        async with live.lease:  # a purge that has begun is not undone
            record = await self.desk.edit(live, build)
            if live.state is State.DELETED:
                live.advance(Change.UNDELETE)
        return session_view(self.desk, record)

    # --- revisions -----------------------------------------------------------------------------------------------

    async def revisions(
        self, tenant: str, session_id: str, page_size: int, page_token: str
    ) -> tuple[list[RevisionView], str]:
        """The session's revisions, oldest first."""
        record = self.record(tenant, session_id, deleted_too=True)
        tree = read_tree(self.desk.store.log, record)
        found, start = list(tree.values()), 0
        if page_token:
            start = next((i + 1 for i, r in enumerate(found) if r.revision_id == page_token), -1)
            if start < 0:
                raise InvalidPageToken(f"page_token {page_token!r} is not one of this session's")
        size = page_length(page_size)
        views = await self._revision_views(record, tree, found[start : start + size])
        more = start + size < len(found)
        return views, views[-1].record.revision_id if more else ""

    async def revision(self, tenant: str, session_id: str, revision_id: str) -> RevisionView:
        """Any revision of the session's tree."""
        record = self.record(tenant, session_id, deleted_too=True)
        found = find_revision(self.desk.store.log, record, revision_id)
        return (await self._revision_views(record, read_tree(self.desk.store.log, record), [found]))[0]

    async def _revision_views(
        self, record: SessionRecord, tree: Tree, wanted: Sequence[RevisionRecord]
    ) -> list[RevisionView]:
        """`exact_upto` of a revision beside the head's branch counts what both have in common."""
        log = self.desk.store.log
        exact = (await exact_view(self.desk, record)).exact_upto
        chain = [revision.revision_id for revision in log.chain(record.tenant, record.head_revision)]
        return [revision_view(log, one, min(exact, shared_upto(tree, one, chain))) for one in wanted]

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
                try:
                    held = len(live.ids)
                    await self.desk.make_room(live, self.desk.policy_now(live, record), held, held)
                    report = await self.desk.warm(live, share=record.seal)
                finally:
                    live.give_room_back()
            live.last_used = time.monotonic()
        return session_view(self.desk, record), report

    async def suspend(self, tenant: str, session_id: str) -> tuple[SessionView, int, int]:
        """Push a session's KV to disk and out of memory. Raises SessionBusy while a turn runs."""
        record = self.record(tenant, session_id)
        live = self.desk.live(tenant, session_id)
        refuse_busy(live)
        written, freed = await self.desk.suspend(live)
        return await exact_view(self.desk, record), written, freed

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

    def refuse_absent_model(self, model: str, adapter: str) -> None:
        """Raises ModelMissing for what this daemon does not serve; empty names ask for what it does."""
        if model and model not in self.model_names:
            raise ModelMissing(f"this daemon serves {self.model_name}, not {model}", model=model)
        if adapter:
            raise ModelMissing("this daemon serves no adapters", adapter=adapter)

    def refuse_foreign(self, record: SessionRecord) -> None:
        """KV and tokens belong to one identity."""
        if record.identity_id == self.desk.identity_id:
            return
        theirs = self.desk.store.log.identity(record.identity_id) or {}
        ours = self.desk.store.log.identity(self.desk.identity_id) or {}
        differing = differing_fields(theirs, ours) or ["identity_id"]
        raise IdentityMismatch(
            f"session {record.session_id} belongs to another model: {', '.join(differing)} differ; fork with recompute",
            field=",".join(differing),
        )

    def record(self, tenant: str, session_id: str, *, deleted_too: bool = False) -> SessionRecord:
        if not session_id:
            raise BadRequest("session_id is required", field="session_id")
        try:
            record = self.desk.store.log.session(tenant, session_id)
        except SessionNotFound:
            if (tenant, session_id) in {(k.tenant, k.session_id) for k in self.desk.store.lost}:
                told = f"session {session_id} is in the catalog but not in the log"
                raise DataLoss(told, session_id=session_id) from None
            raise
        if record.deleted_us is not None and not deleted_too:
            raise SessionDeleted(f"session {session_id} is deleted; UndeleteSession brings it back")
        return record

    def _is_damaged(self, tenant: str, session_id: str) -> bool:
        """Whether the log has a record of that session that cannot be read."""
        try:
            self.desk.store.log.session(tenant, session_id)
        except RecordCorrupt:
            return True
        except SessionNotFound:
            pass
        return False

    async def _purge(self, tenant: str, session_id: str) -> int:
        """Erase a session: its records, and all KV that no other session of the tenant uses."""
        # The index first: a death in between leaves a session to purge again, not one the log seems to have lost.
        await self.desk.in_sql(self.desk.store.catalog.remove_session, tenant, session_id)
        freed: int = await self.desk.in_pool(erase_session, self.desk.store, tenant, session_id)
        self.desk.lives.pop((tenant, session_id), None)
        self.desk.explanations.forget(tenant, session_id)
        store = self.desk.store
        store.lost = [key for key in store.lost if (key.tenant, key.session_id) != (tenant, session_id)]
        return freed


def refuse_busy(live: Live) -> None:
    """Raises SessionBusy while a turn runs."""
    if live.turn:
        running = live.turn.plan.request.request_id
        raise SessionBusy(f"turn {running} is running", retry_after=1.0, request_id=running)


def check_etag(record: SessionRecord, etag: str) -> None:
    if etag and etag != str(record.generation):
        raise EtagMismatch(f"the session changed: etag is {record.generation}, not {etag}", etag=record.generation)


def _purgeable(record: SessionRecord, now_us: int) -> bool:
    return record.deleted_us is not None and record.purge_us is not None and record.purge_us <= now_us


def _expired(record: SessionRecord, now_us: int) -> bool:
    return record.deleted_us is None and record.expire_us is not None and record.expire_us <= now_us
