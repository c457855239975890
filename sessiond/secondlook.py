"""What is wrong with one record, or one owner's KV, right now.

A scan beside running turns sees changes in part: it only raises suspicion. What it suspects is looked at again here,
record by record, before it is reported or mended.
"""

from __future__ import annotations

from sessiond.errors import RecordCorrupt, SessionNotFound
from sessiond.references import reference_of
from sessiond.storage import keys
from sessiond.storage.catalog import SessionRow
from sessiond.storage.crossrefs import check_key
from sessiond.storage.findings import CHECKSUM, INDEX_LAGS, INDEX_ONLY, MISSING, Finding, Severity
from sessiond.storage.kv import KVOwner
from sessiond.storage.records import CellRef
from sessiond.storage.scan import Checked, check_kv_record, is_complete, pages
from sessiond.storage.store import Store
from sessiond.types import Span


def log_findings(store: Store, key: bytes) -> list[Finding]:
    """What is wrong with a record of the log, what it refers to, and the KV that it names."""
    found = check_key(store.log.environment, key)
    if found or keys.split(key)[1] not in (keys.CELL_REF, keys.TAIL_REF):
        return found
    owner = referred(store, key)
    if owner is None or store.blocks.holds(owner) or referred(store, key) != owner:
        return []
    return [Finding(Severity.REPAIRABLE, MISSING, owner.tenant, key, "the KV it names is not there")]


def referred(store: Store, key: bytes) -> KVOwner | None:
    """Whose KV the reference under `key` names; None if it is gone or damaged."""
    tenant, kind, rest = keys.split(key)
    try:
        if kind == keys.CELL_REF:
            return KVOwner(tenant, "cell", rest) if store.log.cell_ref(tenant, rest) else None
        (revision_id,) = keys.split_strings(rest)
        tail = store.log.tail_ref(tenant, revision_id)
        return KVOwner(tenant, "tail", revision_id.encode(), tail.generation) if tail else None
    except RecordCorrupt:
        return None


def owner_findings(store: Store, owner: KVOwner) -> list[Finding]:
    """What is wrong with the KV that a reference names. KV without one is no damage: the collector's."""
    checked = [
        check_kv_record(key, value) for page in pages(store.blocks.environment, owner.prefix) for key, value in page
    ]
    return judge(store, owner, checked)


def judge(store: Store, owner: KVOwner, checked: list[Checked]) -> list[Finding]:
    """The same, of all its records as they were read before."""
    ref = reference_of(store, owner)  # read after the KV: while that is being deleted, it is gone already
    if ref is None:
        return []
    span = Span(ref.start, ref.start + (ref.n_tokens if isinstance(ref, CellRef) else ref.length))
    damaged = [one for one in checked if one.damage]
    if damaged:
        return [_kv_finding(owner, one.key, CHECKSUM, one.damage, span) for one in damaged]
    if is_complete([one.extent for one in checked if one.extent], ref):
        return []
    return [_kv_finding(owner, owner.prefix, MISSING, "records of it are missing", span)]


def _kv_finding(owner: KVOwner, key: bytes, kind: str, message: str, span: Span) -> Finding:
    return Finding(Severity.REPAIRABLE, kind, owner.tenant, key, message, tokens=span)


def stray_findings(store: Store, key: bytes) -> list[Finding]:
    """A key of blocks that names no owner."""
    with store.blocks.environment.read() as txn:
        value = txn.get(key)
        checked = None if value is None else check_kv_record(key, bytes(value))
    if checked is None or not checked.damage:
        return []
    return [Finding(Severity.REPAIRABLE, CHECKSUM, "", key, checked.damage)]


def row_findings(store: Store, tenant: str, session_id: str) -> list[Finding]:
    """Whether the SQL index says of a session what the log says."""
    try:
        record = store.log.session(tenant, session_id)
    except SessionNotFound:
        if not store.catalog.has_session(tenant, session_id):  # looked up after the log: a purge goes the other way
            return []
        message = "the index knows this session and the log does not"
        return [Finding(Severity.LOSS, INDEX_ONLY, tenant, b"", message, session_id)]
    except RecordCorrupt:
        return []  # told by the log
    if not store.catalog.lagging([SessionRow.of(record)]):
        return []
    message = "the index does not say what the log says"
    return [Finding(Severity.NOTICE, INDEX_LAGS, tenant, b"", message, session_id)]
