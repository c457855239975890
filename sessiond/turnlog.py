"""What a turn writes to the log: its opening, then its revision, or its end without one.

Each is one transaction, durable when its function returns. The tokens in between are logged one by one (turn.py).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np

from sessiond.branch import computed_upto
from sessiond.desk import Desk
from sessiond.live import Live, touched
from sessiond.messages import encode_messages
from sessiond.storage.batch import LogBatch
from sessiond.storage.records import RequestRecord, RequestState, RevisionRecord, SessionRecord
from sessiond.template import Message
from sessiond.turnevents import NOTHING, Finished
from sessiond.turnplan import TurnPlan


async def open_turn(desk: Desk, live: Live, plan: TurnPlan) -> None:
    """Write request and prompt, and the session's pointer to them."""

    def build(record: SessionRecord) -> LogBatch:
        batch = LogBatch()
        batch.put_request(plan.request)
        if plan.prompt:
            ids, flags = np.array(plan.prompt, np.uint32), np.array(plan.flags, np.uint8)
            batch.append_tokens(record.tenant, plan.request.revision_id, 0, ids, flags)
        extra = {**record.extra, "open_request": plan.request.request_id}
        batch.put_session(replace(record, extra=extra))
        return batch

    await desk.edit(live, build)


async def commit_turn(
    desk: Desk, live: Live, plan: TurnPlan, finished: Finished, generated: list[int], *, aborted: bool
) -> None:
    """Write the revision, the session's new head and the finished request; then add them to the history in memory.

    `generated`: the answer's tokens that stay in the log. The cache must hold none beyond them.
    """
    history, now = len(live.ids), desk.now_us()
    revision = RevisionRecord(
        tenant=plan.record.tenant,
        revision_id=plan.request.revision_id,
        session_id=plan.record.session_id,
        parent=plan.request.base_revision,
        kind="append" if plan.kind == "append" else "turn",
        log_start=history,
        log_end=finished.committed,
        position_start=history,
        position_end=finished.committed,
        n_prompt=len(plan.prompt),
        n_generated=len(generated),
        finish_reason=str(finished.reason) if finished.reason else None,
        aborted=aborted,
        created_us=now,
        request_id=plan.request.request_id,
        usage=finished.usage,
        extra={
            "computed": live.cache.length if live.cache else computed_upto(live.chain),
            "ended": _ended_how(desk, plan, generated),
        },
    )
    ids = [*plan.prompt, *generated]

    def build(record: SessionRecord) -> LogBatch:
        batch = LogBatch()
        batch.delete_revision(record.tenant, revision.revision_id)
        if ids:
            flags = plan.flags + [0] * len(generated)
            batch.append_tokens(
                record.tenant, revision.revision_id, 0, np.array(ids, np.uint32), np.array(flags, np.uint8)
            )
        said = () if plan.kind == "append" else (Message("assistant", finished.answer),)
        batch.put_revision(revision, encode_messages(plan.messages, said))
        batch.put_session(
            replace(
                touched(_closed(record), now),
                head_revision=revision.revision_id,
                updated_us=now,
                generation=record.generation + 1,
            )
        )
        state: RequestState = "aborted" if aborted else "finished"
        batch.put_request(replace(plan.request, state=state, updated_us=now, finished=finished.to_json()))
        return batch

    await desk.edit(live, build)
    live.head, live.chain = revision.revision_id, [*live.chain, revision]
    live.ids = np.concatenate([live.ids, np.array(ids, np.uint32)])


async def suspend_turn(desk: Desk, request: RequestRecord) -> RequestRecord:
    """Leave the request open; returns it as written. Tokens stay in the log, their KV hot until the session idles."""
    suspended = replace(request, state="suspended", updated_us=desk.now_us())
    batch = LogBatch()
    batch.put_request(suspended)
    await asyncio.wrap_future(desk.store.log.write(batch))
    return suspended


async def discard_turn(
    desk: Desk, live: Live, request: RequestRecord, failed: dict[str, str] | None = None
) -> SessionRecord:
    """Close the request without a revision: drop its tokens, the session's pointer to it, and then their KV.

    The engine must be done with the cache. `failed`: reason and message of the error, if that is why. Returns the
    session's record afterwards. What raises leaves request and KV as they were.
    """
    now = desk.now_us()

    def build(record: SessionRecord) -> LogBatch:
        batch = LogBatch()
        batch.put_session(close_request(batch, record, request, now, failed))
        return batch

    record = await desk.edit(live, build)
    if live.cache:
        live.cache.truncate(len(live.ids), desk.store.cell_tokens)
    return record


def close_request(
    batch: LogBatch, record: SessionRecord, request: RequestRecord, now: int, failed: dict[str, str] | None = None
) -> SessionRecord:
    """Have `batch` end the request without a revision; returns the session's record for the caller to put."""
    batch.delete_revision(record.tenant, request.revision_id)
    state: RequestState = "failed" if failed else "aborted"
    finished = {"error": failed} if failed else NOTHING.to_json()
    batch.put_request(replace(request, state=state, updated_us=now, finished=finished))
    return _closed(record)


def _closed(record: SessionRecord) -> SessionRecord:
    """The record without its pointer to an open request."""
    return replace(record, extra={k: v for k, v in record.extra.items() if k != "open_request"})


def _ended_how(desk: Desk, plan: TurnPlan, generated: list[int]) -> str | None:
    """Whether the answer's end-of-turn tokens are logged; None where there is no answer to close."""
    if plan.kind == "append":
        return None
    return "stop_token" if generated and generated[-1] in desk.stop_ids else "open"
