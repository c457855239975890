"""Forks and rollbacks: heads multiply or move; revisions, tokens and KV stay where they are."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from sessiond.branch import computed_upto
from sessiond.desk import Desk
from sessiond.errors import BadRequest, RequestIdReused, SessionExists
from sessiond.history import read_history
from sessiond.live import Live, touched
from sessiond.newsession import fresh_record, made_before, session_id_of
from sessiond.retelling import retold_session
from sessiond.sessions import Sessions, check_etag, refuse_busy
from sessiond.sharing import common_tokens
from sessiond.storage.batch import LogBatch
from sessiond.storage.records import RequestRecord, SessionRecord
from sessiond.tree import find_revision
from sessiond.turnlog import close_request
from sessiond.views import Fork, NewSession, Rollback, SessionView, session_view


async def fork(sessions: Sessions, tenant: str, asked: Fork) -> SessionView:
    """A new session whose head is a revision of another. One small transaction: no token and no KV is copied.

    With `recompute` it takes messages and tokens along instead, also from another model's session. The same request_id
    again returns the session it made. Raises RevisionNotFound, RequestIdReused, IdentityMismatch.
    """
    sessions.refuse_draining()
    desk, log = sessions.desk, sessions.desk.store.log
    if (asked.model or asked.adapter) and not asked.recompute:
        raise BadRequest("another model or adapter needs recompute", field="model" if asked.model else "adapter")
    sessions.refuse_absent_model(asked.model, asked.adapter)
    if asked.policy is not None:
        desk.check_policy(*asked.policy)
    fork_id = session_id_of(tenant, asked.request_id)
    if made := made_before(log, tenant, asked.request_id, asked.digest):
        return session_view(desk, made)
    source = sessions.record(tenant, asked.session_id)
    if asked.recompute:
        return await _fork_recomputed(sessions, source, fork_id, asked)
    sessions.refuse_foreign(source)
    head = find_revision(log, source, asked.revision_id or source.head_revision)
    record = fresh_record(
        tenant, fork_id, asked, desk.now_us(), head=head.revision_id, root=source.root_revision,
        model=source.model, adapter=source.adapter, identity_id=source.identity_id, seal=source.seal,
        policy=source.policy, extra={"fork_point": head.revision_id},
    )  # fmt: skip
    batch = LogBatch()
    batch.pin_revision(tenant, head.revision_id, fork_id)  # fails if a purge has just taken it away
    batch.put_session(record, expect_generation=0)
    try:
        await asyncio.wrap_future(log.write(batch))
    except SessionExists:  # the same request, at the same time
        made = made_before(log, tenant, asked.request_id, asked.digest)
        return session_view(desk, made or log.session(tenant, fork_id))
    desk.index(record)
    return session_view(desk, record)


async def _fork_recomputed(sessions: Sessions, source: SessionRecord, fork_id: str, asked: Fork) -> SessionView:
    """A session of this daemon's model with the same messages: it shares neither revisions nor KV with `source`."""
    desk, log = sessions.desk, sessions.desk.store.log
    new = NewSession(
        request_id=asked.request_id,
        digest=asked.digest,
        policy=asked.policy or (str(source.policy["name"]), dict(source.policy["knobs"])),
        labels=asked.labels,
        ttl_us=asked.ttl_us,
        expire_us=asked.expire_us,
    )

    def tell() -> tuple[SessionRecord, LogBatch]:
        head = find_revision(log, source, asked.revision_id or source.head_revision)
        history, _ = read_history(log, source, head, whole_tree=False)
        return retold_session(desk, source.tenant, history, source, new, sessions.model_name)

    desk.store.require_space()
    record, batch = await desk.in_pool(tell)
    try:
        await asyncio.wrap_future(log.write(batch))
    except SessionExists:  # the same request, at the same time
        made = made_before(log, source.tenant, asked.request_id, asked.digest)
        return session_view(desk, made or log.session(source.tenant, fork_id))
    desk.index(record)
    return session_view(desk, record)


async def rollback(sessions: Sessions, tenant: str, asked: Rollback) -> SessionView:
    """Move the head to a revision of the session's tree; KV of what both heads share stays in memory.

    A suspended turn is given up. The same request_id again moves nothing. Raises RevisionNotFound, RequestIdReused,
    EtagMismatch, SessionBusy.
    """
    sessions.refuse_draining()
    desk, log = sessions.desk, sessions.desk.store.log
    sessions.record(tenant, asked.session_id)
    if not asked.revision_id:
        raise BadRequest("a rollback names a revision", field="revision_id")
    live = desk.live(tenant, asked.session_id)
    refuse_busy(live)
    async with live.lease:
        record = sessions.record(tenant, asked.session_id)
        if asked.request_id and (known := log.request(tenant, asked.session_id, asked.request_id)):
            if known.digest != asked.digest:
                raise RequestIdReused(
                    f"request_id {asked.request_id} belongs to a different request", request_id=asked.request_id
                )
            return session_view(desk, record)
        check_etag(record, asked.etag)
        target = find_revision(log, record, asked.revision_id)
        await desk.unsettle(live)
        try:
            live.load_history(log, record.head_revision)
            before = live.ids
            record = await _move_head(desk, live, asked, target.revision_id)
            live.load_history(log, record.head_revision)
            if live.cache:
                # An answer's last token was fed by the turn that is left behind, in a step of other shapes: of what is
                # not sealed, only what the head's own turns computed is as if that turn had never been.
                common, cell = common_tokens(before, live.ids), desk.store.cell_tokens
                sealed = min(live.cache.sealed, common // cell * cell)
                live.cache.truncate(min(common, max(sealed, computed_upto(live.chain))), cell)
                live.persisted = min(live.persisted, live.cache.length)
        finally:
            if live.cache:
                desk.settle(live)
            live.last_used = time.monotonic()
    return session_view(desk, record)


async def _move_head(desk: Desk, live: Live, asked: Rollback, revision_id: str) -> SessionRecord:
    """One transaction: the turn that stands suspended, if one does, is given up with it or stays with the old head."""
    now, log = desk.now_us(), desk.store.log

    def build(record: SessionRecord) -> LogBatch:
        check_etag(record, asked.etag)
        batch = LogBatch()
        moved = replace(
            touched(record, now), head_revision=revision_id, updated_us=now, generation=record.generation + 1
        )
        open_id = record.extra.get("open_request")
        if open_id and (suspended := log.request(live.tenant, live.session_id, open_id)):
            moved = close_request(batch, moved, suspended, now)
        batch.put_session(moved, expect_generation=record.generation)
        if asked.request_id:
            batch.put_request(
                RequestRecord(
                    tenant=live.tenant,
                    session_id=live.session_id,
                    request_id=asked.request_id,
                    digest=asked.digest,
                    state="finished",
                    base_revision=record.head_revision,
                    revision_id=revision_id,
                    params={"mode": "rollback"},
                    created_us=now,
                    updated_us=now,
                )
            )
        return batch

    return await desk.edit(live, build)
