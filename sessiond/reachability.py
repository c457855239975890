"""What sessions lead to: revisions, tokens and sealed cells that somebody may still ask for.

A session leads to its head, its root, the revision it was forked at and every revision it made (those it rolled back
behind too), to all their ancestors, to its open request's turn, and to the cells of every branch through these, under
its own identity. Deleted sessions count until they are purged. What cannot be read keeps everything it might lead to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import structlog

from sessiond.branch import Ids
from sessiond.errors import RecordCorrupt, RevisionNotFound, SessionNotFound
from sessiond.storage import keys
from sessiond.storage.log import LogStore
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import RequestRecord, RevisionRecord
from sessiond.storage.store import Store

logger = structlog.get_logger()


@dataclass(slots=True)
class Reachable:
    """What some sessions of one tenant lead to. `all_…`: damage hides which, so any may be."""

    sessions: set[str] = field(default_factory=set)
    revisions: set[str] = field(default_factory=set)  # those that turns which have not ended may become, too
    cells: set[bytes] = field(default_factory=set)
    all_revisions: bool = False
    all_cells: bool = False

    def add(self, other: Reachable) -> None:
        """Lead to what `other` leads to as well."""
        self.sessions |= other.sessions
        self.revisions |= other.revisions
        self.cells |= other.cells
        self.all_revisions |= other.all_revisions
        self.all_cells |= other.all_cells


def reachable(store: Store, tenant: str, listed: Collection[str], pause: Callable[[], None]) -> Reachable:
    """What all sessions of a tenant lead to.

    One that the SQL index lists (`listed`: ids) and the log has lost may lead to anything. `pause` is called between
    sessions.
    """
    found = Reachable()
    for session_id in store.log.ids(tenant, keys.SESSION):
        found.add(reachable_from(store, tenant, session_id))
        pause()
    for session_id in listed:
        if not store.log.has_session(tenant, session_id):
            found.sessions.add(session_id)
            found.all_revisions = found.all_cells = True
    return found


def reachable_from(store: Store, tenant: str, session_id: str) -> Reachable:
    """What one session leads to. Nothing, if there is none; all it might, if its record cannot be read."""
    log = store.log
    found = Reachable({session_id})
    indexed = log.ids(tenant, keys.REVISION_INDEX, session_id)
    roots, identity = set(indexed), ""
    try:
        record = log.session(tenant, session_id)
    except RecordCorrupt as error:
        _damaged(found, session_id, error)
    except SessionNotFound:
        pass  # lost, or purged meanwhile: what its index names is all that is left of it
    else:
        roots |= {record.head_revision, record.root_revision}
        if fork_point := record.extra.get("fork_point"):
            roots.add(str(fork_point))
        identity = record.identity_id
        open_id = record.extra.get("open_request")
        if open_id and open_id not in log.ids(tenant, keys.REQUEST, session_id):
            found.all_revisions = found.all_cells = True  # its turn's tokens are named nowhere else
    requests = _open_requests(log, tenant, session_id, found)
    roots |= {request.base_revision for request in requests}
    chains = _Chains(log, tenant, session_id, found)
    chains.close(roots)
    found.revisions |= {request.revision_id for request in requests}
    if identity:
        for ids in [*chains.branches(), *chains.open_branches(requests)]:
            found.cells.update(prefix_hashes(tenant, identity, ids, store.cell_tokens))
    return found


def branches(store: Store, tenant: str, session_id: str, identity_id: str) -> list[Ids]:
    """Token ids of a session's branches, root to leaf, as far as they can be read; none of another identity."""
    try:
        record = store.log.session(tenant, session_id)
    except (RecordCorrupt, SessionNotFound):
        return []
    if record.identity_id != identity_id:
        return []
    chains = _Chains(store.log, tenant, session_id, Reachable())
    chains.close({record.head_revision, *store.log.ids(tenant, keys.REVISION_INDEX, session_id)})
    return list(chains.branches())


def _open_requests(log: LogStore, tenant: str, session_id: str, found: Reachable) -> list[RequestRecord]:
    out = []
    for request_id in log.ids(tenant, keys.REQUEST, session_id):
        try:
            request = log.request(tenant, session_id, request_id)
        except RecordCorrupt as error:  # it may stand open, and its turn's tokens are named nowhere else
            _damaged(found, session_id, error)
            continue
        if request and request.state in ("running", "suspended"):
            out.append(request)
    return out


class _Chains:
    """Revisions of one session's tree, read once each."""

    def __init__(self, log: LogStore, tenant: str, session_id: str, found: Reachable) -> None:
        self.log, self.tenant, self.session_id, self.found = log, tenant, session_id, found
        self.records: dict[str, RevisionRecord] = {}

    def close(self, roots: Iterable[str]) -> None:
        """Add these revisions and all their ancestors."""
        for revision_id in roots:
            at: str | None = revision_id
            while at is not None and at not in self.found.revisions:
                self.found.revisions.add(at)
                try:
                    self.records[at] = record = self.log.revision(self.tenant, at)
                except (RecordCorrupt, RevisionNotFound) as error:
                    _damaged(self.found, self.session_id, error)
                    break
                at = record.parent

    def branches(self) -> Iterable[Ids]:
        """Token ids of every branch, root to leaf. One that cannot be read in full keeps all cells."""
        parents = {record.parent for record in self.records.values()}
        for leaf in self.records.values():
            if leaf.revision_id not in parents:
                yield self._ids(leaf)

    def open_branches(self, requests: Iterable[RequestRecord]) -> Iterable[Ids]:
        """Token ids of turns that have not ended, behind those they go on from."""
        for request in requests:
            base = self.records.get(request.base_revision)
            history = self._ids(base) if base else np.zeros(0, np.uint32)
            if base is None or len(history) == base.log_end:
                yield np.concatenate([history, self._tokens(request.revision_id, None)])

    def _ids(self, leaf: RevisionRecord) -> Ids:
        chain, at = [leaf], leaf.parent
        while at is not None and at in self.records and len(chain) <= len(self.records):
            chain.append(self.records[at])
            at = self.records[at].parent
        if at is not None:
            return np.zeros(0, np.uint32)  # an ancestor is missing: `close` has said so
        parts = []
        for record in reversed(chain):
            ids = self._tokens(record.revision_id, record.log_end - record.log_start)
            parts.append(ids)
            if len(ids) != record.log_end - record.log_start:
                break
        return np.concatenate(parts)

    def _tokens(self, revision_id: str, expected: int | None) -> Ids:
        try:
            return self.log.tokens(self.tenant, revision_id, expected)[0]
        except RecordCorrupt as error:
            logger.warning("damaged tokens keep cells", session=self.session_id, error=error.message)
            self.found.all_cells = True
            return np.zeros(0, np.uint32)


def _damaged(found: Reachable, session_id: str, error: RecordCorrupt | RevisionNotFound) -> None:
    logger.warning("damage keeps what it might lead to", session=session_id, error=error.message)
    found.all_revisions = found.all_cells = True
