"""A history as a new session: fresh ids for everything, one batch that makes all of it appear."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from sessiond.desk import Desk
from sessiond.errors import BadTokens, ContextTooLong
from sessiond.history import History
from sessiond.messages import encode_messages
from sessiond.newsession import fresh_record, session_id_of
from sessiond.storage.batch import LogBatch
from sessiond.storage.records import RevisionRecord, SessionRecord
from sessiond.views import NewSession


def check_fits(desk: Desk, history: History) -> None:
    """Raises ContextTooLong or BadTokens for a history that this model cannot hold."""
    longest = max(history.ends)
    if longest > desk.max_context:
        raise ContextTooLong(
            f"{longest} tokens of history exceed the model's context of {desk.max_context}",
            history_tokens=longest,
            new_tokens=0,
            max_context_tokens=desk.max_context,
        )
    for told in history.revisions:
        if len(told.ids) and int(told.ids.max()) >= desk.vocab_size:
            raise BadTokens(
                f"token id {int(told.ids.max())} is outside the vocabulary of {desk.vocab_size}",
                token=int(told.ids.max()),
                vocab_size=desk.vocab_size,
            )


def transplant(
    desk: Desk, tenant: str, history: History, new: NewSession, model_name: str, extra: Mapping[str, Any]
) -> tuple[SessionRecord, list[RevisionRecord], LogBatch]:
    """The new session's record, its revisions in the history's order, and the batch that writes all of it.

    Of `new` count request_id, digest, policy, labels and expiry. The batch fails with SessionExists if there is such a
    session. KV is not in it: whoever has some adds references to the batch.
    """
    now = desk.now_us()
    session_id = session_id_of(tenant, new.request_id)
    names = [uuid.uuid4().hex for _ in history.revisions]
    revisions: list[RevisionRecord] = []
    batch = LogBatch()
    for index, told in enumerate(history.revisions):
        parent = None if told.parent is None else revisions[told.parent]
        start, end = history.start(index), history.ends[index]
        own: dict[str, Any] = {"ended": told.ended, "computed": told.computed}
        if index == 0:
            own["tools"] = list(told.tools)
        if told.moved:
            own["moved"] = True
        record = RevisionRecord(
            tenant=tenant,
            revision_id=names[index],
            session_id=session_id,
            parent=parent.revision_id if parent else None,
            kind=told.kind,
            log_start=start,
            log_end=end,
            position_start=start,
            position_end=end,
            n_prompt=told.n_prompt,
            n_generated=len(told.ids) - told.n_prompt,
            finish_reason=told.finish_reason,
            aborted=told.aborted,
            # Listed by time: a child is never older than its parent, and nothing is newer than now by more than that.
            created_us=max(min(told.created_us, now), parent.created_us + 1 if parent else 0),
            request_id=told.request_id,
            usage=told.usage,
            extra=own,
        )
        revisions.append(record)
        if len(told.ids):
            batch.append_tokens(tenant, names[index], 0, told.ids, told.flags.astype(np.uint8))
        batch.put_revision(record, encode_messages(told.asked, told.said))
    session = fresh_record(
        tenant, session_id, new, now, head=names[history.head], root=names[0],
        model=model_name, adapter="", identity_id=desk.identity_id, seal=desk.settings.seal, extra={**extra},
    )  # fmt: skip
    batch.put_session(session, expect_generation=0)
    return session, revisions, batch
