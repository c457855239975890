"""What a new session begins with: its record and its root revision."""

from __future__ import annotations

import uuid

import numpy as np
from blake3 import blake3

from sessiond import admission
from sessiond.desk import Desk
from sessiond.errors import RequestIdReused, SessionNotFound
from sessiond.messages import encode_messages
from sessiond.storage.batch import LogBatch
from sessiond.storage.log import LogStore
from sessiond.storage.records import Json, RevisionRecord, SessionRecord
from sessiond.views import Fork, NewSession


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
    record = fresh_record(
        tenant, session_id, new, now, head=root.revision_id, root=root.revision_id,
        model=model_name, adapter="", identity_id=desk.identity_id, seal=desk.settings.seal,
    )  # fmt: skip
    batch = LogBatch()
    if ids:
        batch.append_tokens(tenant, root.revision_id, 0, np.array(ids, np.uint32), np.array(flags, np.uint8))
    batch.put_revision(root, encode_messages(new.messages, ()))
    batch.put_session(record, expect_generation=0)
    return record, batch


def fresh_record(
    tenant: str,
    session_id: str,
    asked: NewSession | Fork,
    now: int,
    *,
    head: str,
    root: str,
    model: str,
    adapter: str,
    identity_id: str,
    seal: bool,
    policy: Json | None = None,
    extra: Json | None = None,
) -> SessionRecord:
    """The record of a session that a request makes. `policy`: where the request names none."""
    if asked.policy is not None:
        policy = {"name": asked.policy[0], "knobs": asked.policy[1]}
    assert policy is not None
    return SessionRecord(
        tenant=tenant,
        session_id=session_id,
        head_revision=head,
        root_revision=root,
        model=model,
        adapter=adapter,
        identity_id=identity_id,
        policy=policy,
        labels=asked.labels,
        created_us=now,
        updated_us=now,
        last_used_us=now,
        ttl_us=asked.ttl_us,
        expire_us=now + asked.ttl_us if asked.ttl_us is not None else asked.expire_us,
        deleted_us=None,
        purge_us=None,
        generation=1,
        create_request_id=asked.request_id,
        seal=seal,
        extra={"digest": asked.digest, **(extra or {})},
    )


def made_before(log: LogStore, tenant: str, request_id: str, digest: str) -> SessionRecord | None:
    """The session that this request made before. Raises RequestIdReused if another request made it."""
    if not request_id:
        return None
    try:
        record = log.session(tenant, session_id_of(tenant, request_id))
    except SessionNotFound:
        return None
    if record.extra.get("digest") != digest:
        raise RequestIdReused(f"request_id {request_id} made another session", request_id=request_id)
    return record


def session_id_of(tenant: str, request_id: str) -> str:
    """A fresh id, or for a request_id always the same: creating twice then collides instead of making two."""
    if not request_id:
        return uuid.uuid4().hex
    return blake3(f"session\0{tenant}\0{request_id}".encode()).hexdigest(16)
