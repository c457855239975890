"""What a new session begins with: its record and its root revision."""

from __future__ import annotations

import uuid

import numpy as np
from blake3 import blake3

from sessiond import admission
from sessiond.desk import Desk
from sessiond.messages import encode_messages
from sessiond.storage.batch import LogBatch
from sessiond.storage.records import RevisionRecord, SessionRecord
from sessiond.views import NewSession


def begin_session(desk: Desk, tenant: str, new: NewSession, model_name: str) -> tuple[SessionRecord, LogBatch]:
    """The record, and the batch that writes it with its root; the batch fails with SessionExists if there is one.

    Raises BadTokens, BadMessage, ContextTooLong or EmptyInput.
    """
    now = desk.now_us()
    if new.token_ids is not None:
        admission.check_tokens(desk, new.token_ids)
        ids, flags = list(new.token_ids), [0] * len(new.token_ids)
    elif new.messages:
        delta = desk.template.render_root(new.messages, list(new.tools))
        ids, flags = list(delta.ids), list(delta.flags)
    else:
        ids, flags = [], []
    admission.refuse_overlong(desk, 0, len(ids), generates=True)
    session_id = session_id_of(tenant, new.request_id)
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
        model=model_name,
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
    return record, batch


def session_id_of(tenant: str, request_id: str) -> str:
    """A fresh id, or for a request_id always the same: creating twice then collides instead of making two."""
    if not request_id:
        return uuid.uuid4().hex
    return blake3(f"session\0{tenant}\0{request_id}".encode()).hexdigest(16)
