"""What is on disk, counted; and what leaves it with a session."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from sessiond.branch import read_branch
from sessiond.errors import RecordCorrupt
from sessiond.references import cell_refs, tail_ref
from sessiond.storage.batch import LogBatch
from sessiond.storage.kv import KVOwner
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.store import Store

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class DiskTotals:
    """What is on disk, in bytes and records. `coded_pages` are KV records rounded to pages, `index` all other pages."""

    sessions: int
    deleted: int
    suspended: int
    raw: int
    coded: int
    coded_pages: int
    index: int
    log_file: int
    blocks_file: int


def disk_totals(store: Store) -> DiskTotals:
    """Walks all records of the log: for operators, not for a hot path. Leaves out what is damaged."""
    log = store.log
    sessions = deleted = suspended = raw = coded = 0
    for tenant in log.tenants():
        after: tuple[str, str] | None = None
        while page := log.sessions(tenant, after, on_corrupt=_left_out):
            after = (page[-1].tenant, page[-1].session_id)
            sessions += len(page)
            deleted += sum(record.deleted_us is not None for record in page)
            suspended += sum("open_request" in record.extra for record in page)
            tails = [tail_ref(store, tenant, record.head_revision, forget=False)[0] for record in page]
            raw += sum(ref.raw_bytes for ref in tails if ref)
            coded += sum(ref.coded_bytes for ref in tails if ref)
        cells = log.all_cell_refs(tenant, _left_out)
        raw += sum(ref.raw_bytes for ref in cells)
        coded += sum(ref.coded_bytes for ref in cells)
    log_stat, block_stat = log.stat(), store.blocks.stat()
    return DiskTotals(
        sessions=sessions,
        deleted=deleted,
        suspended=suspended,
        raw=raw,
        coded=coded,
        coded_pages=block_stat.overflow_bytes,
        index=block_stat.used_bytes - block_stat.overflow_bytes + log_stat.used_bytes,
        log_file=log_stat.file_bytes,
        blocks_file=block_stat.file_bytes,
    )


def _left_out(error: RecordCorrupt) -> None:
    logger.warning("damaged record not counted", error=error.message)


def erase_session(store: Store, tenant: str, session_id: str) -> int:
    """Delete a session, its revisions and requests, and the KV that no other session of the tenant uses.

    References go first, in one transaction: a death in between leaves unreferenced blocks, no dangling reference.
    Its KV is found by the identity it was made under, whatever model is served now. Returns the bytes of KV freed.
    Raises SessionNotFound.
    """
    log = store.log
    identity_id = log.session(tenant, session_id).identity_id
    kept, kept_cells = _reachable(store, tenant, session_id)
    own = [r for r in log.revisions_of_session(tenant, session_id) if r.revision_id not in kept]
    # A turn that has not ended has tokens under the revision it would become.
    unborn = {r.revision_id for r in log.requests(tenant, session_id)} - kept - {r.revision_id for r in own}
    parents = {revision.parent for revision in own}
    cells: set[bytes] = set()
    for leaf in (r for r in own if r.revision_id not in parents):
        cells |= _cells_of(store, tenant, leaf.revision_id, identity_id)
    found, damaged = cell_refs(store, tenant, sorted(cells - kept_cells))
    refs = [ref for ref in found if ref]
    tails = [ref for ref in (tail_ref(store, tenant, r.revision_id)[0] for r in own) if ref]
    batch = LogBatch()
    for revision in own:
        batch.delete_revision(tenant, revision.revision_id)
    for revision_id in sorted(unborn):
        batch.delete_revision(tenant, revision_id)
    for ref in refs:
        batch.delete_cell_ref(tenant, ref.prefix_hash)
    batch.delete_requests(tenant, session_id)
    batch.delete_session(tenant, session_id)
    log.write(batch).result()
    for prefix_hash in (*(ref.prefix_hash for ref in refs), *damaged):
        store.blocks.delete(KVOwner(tenant, "cell", prefix_hash)).result()
    for tail in tails:
        store.blocks.delete(KVOwner(tenant, "tail", tail.revision_id.encode(), tail.generation)).result()
    return sum(ref.coded_bytes for ref in refs) + sum(tail.coded_bytes for tail in tails)


def _reachable(store: Store, tenant: str, without: str) -> tuple[set[str], set[bytes]]:
    """Revisions and cells that the tenant's other sessions need."""
    revisions: set[str] = set()
    cells: set[bytes] = set()
    after: tuple[str, str] | None = None
    while page := store.log.sessions(tenant, after):
        for record in page:
            after = (record.tenant, record.session_id)
            if record.session_id != without:
                chain = store.log.chain(tenant, record.head_revision)
                revisions |= {revision.revision_id for revision in chain}
                cells |= _cells_of(store, tenant, record.head_revision, record.identity_id)
    return revisions, cells


def _cells_of(store: Store, tenant: str, head: str, identity_id: str) -> set[bytes]:
    _, ids = read_branch(store.log, tenant, head)
    return set(prefix_hashes(tenant, identity_id, ids, store.cell_tokens))
