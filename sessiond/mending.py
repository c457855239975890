"""How damage is mended: what the token log rebuilds is dropped, the index is put right, losses are left alone.

References go first, so a death in between leaves garbage, nothing dangling. Doing it twice changes nothing more.
"""

from __future__ import annotations

from dataclasses import replace

from sessiond.errors import BadRequest
from sessiond.references import delete_unreferenced, reference_of
from sessiond.storage import keys
from sessiond.storage.batch import LogBatch, delete_range
from sessiond.storage.catalog import SessionRow
from sessiond.storage.findings import INDEX_LAGS, Finding, Severity
from sessiond.storage.kv import KVOwner
from sessiond.storage.scan import kv_owners, owner_of
from sessiond.storage.store import Store


def mend(store: Store, finding: Finding) -> Finding:
    """Repair what can be: what the token log rebuilds is dropped, the index is put right. Losses are left alone."""
    if finding.severity is Severity.LOSS:
        return finding
    if finding.kind == INDEX_LAGS:
        store.catalog.correct([SessionRow.of(store.log.session(finding.tenant, finding.session_id))])
        return replace(finding, repaired=True)
    try:
        return replace(finding, repaired=_mend_record(store, *keys.split(finding.key), finding.key))
    except (ValueError, IndexError, BadRequest):  # no key of this format, and so nothing the log refers to
        store.blocks.environment.submit([lambda txn: delete_range(txn, finding.key)], 0, frees=True).result()
        return replace(finding, repaired=True)


def _mend_record(store: Store, tenant: str, kind: int, rest: bytes, key: bytes) -> bool:
    if kind == keys.REVISION_INDEX:
        session_id, revision_id = keys.split_strings(rest)
        batch = LogBatch()
        batch.put_index(tenant, session_id, revision_id)
        store.log.write(batch).result()
        return True
    if kind == keys.PIN:
        revision_id, session_id = keys.split_strings(rest)
        batch = LogBatch()
        batch.pin_revision(tenant, revision_id, session_id)
        store.log.write(batch).result()
        return True
    if kind == keys.PRIOR:
        (revision_id,) = keys.split_strings(rest)
        batch = LogBatch()
        batch.delete_prior(tenant, revision_id)
        store.log.write(batch).result()
        return True
    if kind == keys.CELL_REF:
        return drop(store, KVOwner(tenant, "cell", rest))
    if kind == keys.TAIL_REF:
        return drop(store, KVOwner(tenant, "tail", rest[1:]), any_generation=True)
    return drop(store, owner_of(key))


def drop(store: Store, owner: KVOwner, *, any_generation: bool = False) -> bool:
    """Delete the reference to an owner's KV, then the KV; False if it is being written just now.

    A tail whose reference names another generation keeps that, unless it is `any_generation`.
    """
    dropped = False

    def act(_: list[bytes]) -> None:
        nonlocal dropped
        dropped = True
        batch = LogBatch()
        if owner.kind == "cell":
            batch.delete_cell_ref(owner.tenant, owner.id)
        elif any_generation or reference_of(store, owner) is not None:
            batch.delete_tail_ref(owner.tenant, owner.id.decode())
        if batch.ops:
            store.log.write(batch).result()

    store.inflight.unless_used([owner.name], set(), act)
    if dropped:
        delete_unreferenced(store, list(kv_owners(store.blocks.environment, owner.every_generation)))
    return dropped
