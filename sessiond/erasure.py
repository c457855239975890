"""What leaves the disk with a session, and what stays because other sessions need it, or might."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog

from sessiond.branch import read_branch
from sessiond.errors import Aborted, RecordCorrupt, RevisionNotFound, SessionNotFound
from sessiond.references import cell_refs, delete_unreferenced, tail_ref
from sessiond.storage import keys
from sessiond.storage.batch import LogBatch
from sessiond.storage.kv import KVOwner
from sessiond.storage.log import LogStore
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.store import Store
from sessiond.tree import leaves, read_tree

logger = structlog.get_logger()


@dataclass(slots=True)
class Needed:
    """Revisions and cells that a tenant's other sessions need. Damage hides some cells: then `all_cells` may be."""

    revisions: set[str] = field(default_factory=set)
    cells: set[bytes] = field(default_factory=set)
    all_cells: bool = False


def erase_session(store: Store, tenant: str, session_id: str) -> int:
    """Delete a session, its revisions and requests, and the KV that no other session of the tenant uses.

    References go first, in one transaction: a death in between leaves unreferenced blocks, no dangling reference.
    Its KV is found by the identity it was made under, whatever model is served now. Of a damaged session goes what
    its keys and its readable records lead to; beside one that cannot be read all cells stay. Returns the bytes of KV
    freed. Raises SessionNotFound.

    Revisions that a fork shares stay until the last session that can reach them goes; it takes them along.
    """
    while True:
        with contextlib.suppress(Aborted):  # a fork came between: count again what is needed
            return _erase(store, tenant, session_id)


def _erase(store: Store, tenant: str, session_id: str) -> int:
    log = store.log
    identities = _identities(log, tenant, session_id)
    fork_point = _fork_point(log, tenant, session_id)
    pins = {}
    candidates = _indexed(log, tenant, session_id, fork_point) | _requested(log, tenant, session_id)
    for revision_id in candidates:
        pins[revision_id] = log.pins(tenant, revision_id)
    needed = _needed(store, tenant, session_id)
    own = sorted(candidates - needed.revisions)
    cells = set() if needed.all_cells else _cells_of_revisions(store, tenant, own, identities) - needed.cells
    found, damaged = cell_refs(store, tenant, sorted(cells), forget=False)
    refs = [ref for ref in found if ref]
    doomed = [*(ref.prefix_hash for ref in refs), *damaged]
    tails = [ref for ref in (tail_ref(store, tenant, revision_id)[0] for revision_id in own) if ref]
    batch = LogBatch()
    for revision_id in own:
        batch.expect_pins(tenant, revision_id, pins[revision_id])
    for revision_id in own:
        batch.delete_revision(tenant, revision_id)
        for fork_id in pins[revision_id]:
            batch.unpin_revision(tenant, revision_id, fork_id)
    if fork_point:
        batch.unpin_revision(tenant, fork_point, session_id)
    for prefix_hash in doomed:
        batch.delete_cell_ref(tenant, prefix_hash)
    batch.delete_requests(tenant, session_id)
    batch.delete_session(tenant, session_id)
    log.write(batch).result()
    owners = [KVOwner(tenant, "cell", prefix_hash) for prefix_hash in doomed]
    owners += [KVOwner(tenant, "tail", tail.revision_id.encode(), tail.generation) for tail in tails]
    delete_unreferenced(store, owners)  # another session may be writing one of the cells just now
    return sum(ref.coded_bytes for ref in refs) + sum(tail.coded_bytes for tail in tails)


def _identities(log: LogStore, tenant: str, session_id: str) -> list[str]:
    """The identity of the session's KV; all there are if its record does not say."""
    try:
        return [log.session(tenant, session_id).identity_id]
    except RecordCorrupt as error:
        logger.warning("erasing a damaged session", session=session_id, error=error.message)
        return log.identities()


def _fork_point(log: LogStore, tenant: str, session_id: str) -> str:
    """Where the session was forked; empty if it was not, or its record does not say."""
    with contextlib.suppress(RecordCorrupt):
        return str(log.session(tenant, session_id).extra.get("fork_point", ""))
    return ""


def _indexed(log: LogStore, tenant: str, session_id: str, fork_point: str) -> set[str]:
    """The session's own revisions, and all of the sessions whose past it shares: purged ones may have left some."""
    found = set(log.ids(tenant, keys.REVISION_INDEX, session_id))
    if not fork_point:
        return found
    owners = set()
    for revision_id in _lineage(log, tenant, [fork_point]):
        with contextlib.suppress(RecordCorrupt, RevisionNotFound):
            owners.add(log.revision(tenant, revision_id).session_id)
    for owner in owners:
        found |= set(log.ids(tenant, keys.REVISION_INDEX, owner))
    return found


def _requested(log: LogStore, tenant: str, session_id: str) -> set[str]:
    """Revisions that requests became or would have become: the tokens of a turn that did not end are under its."""
    found = set()
    for request_id in log.ids(tenant, keys.REQUEST, session_id):
        with contextlib.suppress(RecordCorrupt):
            if request := log.request(tenant, session_id, request_id):
                found.add(request.revision_id)
    return found


def _cells_of_revisions(store: Store, tenant: str, own: Iterable[str], identities: list[str]) -> set[bytes]:
    """Cells of all branches through these revisions, as far as they can be read."""
    readable = []
    for revision_id in own:
        with contextlib.suppress(RecordCorrupt, RevisionNotFound):
            readable.append(store.log.revision(tenant, revision_id))
    cells: set[bytes] = set()
    try:
        for leaf in leaves(readable):
            cells |= _cells_of(store, tenant, leaf, identities)
    except RecordCorrupt:
        for revision in readable:  # the damage lies somewhere between root and leaf
            with contextlib.suppress(RecordCorrupt):
                cells |= _cells_of(store, tenant, revision.revision_id, identities)
    return cells


def _cells_of(store: Store, tenant: str, head: str, identities: list[str]) -> set[bytes]:
    _, ids = read_branch(store.log, tenant, head)
    return {cell for one in identities for cell in prefix_hashes(tenant, one, ids, store.cell_tokens)}


def _needed(store: Store, tenant: str, without: str) -> Needed:
    """What the tenant's other sessions need."""
    log, needed = store.log, Needed()
    for session_id in log.ids(tenant, keys.SESSION):
        if session_id == without:
            continue
        heads: list[str] = []
        try:
            record = log.session(tenant, session_id)
            heads += [record.head_revision, record.root_revision, str(record.extra.get("fork_point", ""))]
            tree = read_tree(log, record)
            needed.revisions |= tree.keys()
            for leaf in leaves(tree.values()):
                needed.cells |= _cells_of(store, tenant, leaf, [record.identity_id])
        except SessionNotFound:
            continue  # purged meanwhile
        except (RecordCorrupt, RevisionNotFound) as error:
            if session_id not in log.ids(tenant, keys.SESSION):
                continue
            logger.warning("a damaged session keeps KV from being erased", session=session_id, error=error.message)
            needed.all_cells = True
            known = [*filter(None, heads), *log.ids(tenant, keys.REVISION_INDEX, session_id)]
            needed.revisions |= _lineage(log, tenant, known)
    return needed


def _lineage(log: LogStore, tenant: str, revisions: list[str]) -> set[str]:
    """These revisions and their ancestors, as far as they can be read."""
    found: set[str] = set()
    for revision_id in revisions:
        at: str | None = revision_id
        while at is not None and at not in found:
            found.add(at)
            try:
                at = log.revision(tenant, at).parent
            except (RecordCorrupt, RevisionNotFound):
                break
    return found
