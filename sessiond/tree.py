"""A session's tree: its own revisions, and those before the point where it was forked from another session."""

from __future__ import annotations

from collections.abc import Iterable

from sessiond.errors import RecordCorrupt, RevisionNotFound
from sessiond.storage.log import LogStore
from sessiond.storage.records import RevisionRecord, SessionRecord

Tree = dict[str, RevisionRecord]


def read_tree(log: LogStore, record: SessionRecord) -> Tree:
    """Every revision of the session by id, a parent before its children. Raises RecordCorrupt or RevisionNotFound."""
    fork_point = record.extra.get("fork_point")
    shared = log.chain(record.tenant, fork_point) if fork_point else []
    own = log.revisions_of_session(record.tenant, record.session_id)
    known = _behind([record.root_revision, *(revision.revision_id for revision in shared)], own)
    return {one.revision_id: one for one in (*shared, *(one for one in own if one.revision_id in known))}


def _behind(first: Iterable[str], revisions: Iterable[RevisionRecord]) -> set[str]:
    """`first` and what descends from it. A session made again with a request_id whose session was purged has that
    one's id, under which revisions stay that forks need: they are not the new session's."""
    children: dict[str | None, list[str]] = {}
    for revision in revisions:
        children.setdefault(revision.parent, []).append(revision.revision_id)
    found = set(first)
    todo = list(found)
    while todo:
        new = set(children.get(todo.pop(), ())) - found
        found |= new
        todo += new
    return found


def leaves(revisions: Iterable[RevisionRecord]) -> list[str]:
    """The ends of their branches."""
    known = {revision.revision_id: revision.parent for revision in revisions}
    parents = set(known.values())
    return [revision_id for revision_id in known if revision_id not in parents]


def leaves_behind(log: LogStore, head: RevisionRecord) -> list[str]:
    """Ends of the branches that go on behind `head`, newest first: its session's and those of sessions forked there."""
    children: dict[str | None, list[RevisionRecord]] = {}
    for session_id in dict.fromkeys([head.session_id, *log.pins(head.tenant, head.revision_id)]):
        for revision in log.revisions_of_session(head.tenant, session_id):
            children.setdefault(revision.parent, []).append(revision)
    found, todo = [], list(children.get(head.revision_id, ()))
    while todo:
        revision = todo.pop()
        todo += children.get(revision.revision_id, ())
        if revision.revision_id not in children:
            found.append(revision)
    return [revision.revision_id for revision in sorted(found, key=lambda one: -one.created_us)]


def find_revision(log: LogStore, record: SessionRecord, revision_id: str) -> RevisionRecord:
    """A revision of the session's tree. Raises RevisionNotFound, also for one of another tree."""
    found = log.revision(record.tenant, revision_id)
    if found.session_id == record.session_id:
        is_own = revision_id == record.head_revision or _root_of(log, found) in (None, record.root_revision)
    else:
        is_own = False
    if not is_own and revision_id not in read_tree(log, record):
        raise RevisionNotFound(f"no revision {revision_id} in session {record.session_id}")
    return found


def _root_of(log: LogStore, revision: RevisionRecord) -> str | None:
    """The root of its branch; None if damage hides it, which whoever reads the branch is told."""
    try:
        return log.chain(revision.tenant, revision.revision_id)[0].revision_id
    except RecordCorrupt:
        return None


def shared_upto(tree: Tree, revision: RevisionRecord, chain: Iterable[str]) -> int:
    """Positions that the branch ending at `revision` has in common with the branch `chain` of the same tree."""
    on_chain = set(chain)
    at: RevisionRecord | None = revision
    while at is not None and at.revision_id not in on_chain:
        at = tree.get(at.parent) if at.parent else None
    return at.position_end if at is not None else 0
