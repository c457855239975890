"""Finds what nobody leads to, and erases it: cells, revisions, tokens of turns that ended, KV without a reference.

It may die at any point and run beside turns. References go before the KV they name, children before their parents, so
what a death leaves is garbage again. What is written while it looks is left alone (`Store.inflight`): candidates are
listed first, what sessions lead to is read afterwards, and what was begun in between is not touched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sessiond.errors import Aborted, RecordCorrupt, RevisionNotFound
from sessiond.reachability import Reachable, reachable
from sessiond.references import delete_unreferenced, is_referenced
from sessiond.storage import keys
from sessiond.storage.batch import LogBatch
from sessiond.storage.findings import UNREFERENCED, Finding, Severity
from sessiond.storage.kv import KVOwner
from sessiond.storage.log import LogStore
from sessiond.storage.scan import key_pages, kv_owners
from sessiond.storage.store import Store

BATCH = 256
SECOND_LOOK_SECONDS = 0.1

Pause = Callable[[], None]


@dataclass(slots=True)
class _Candidates:
    """What a tenant's log holds, before anybody looked at what leads to it."""

    cells: list[bytes] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)  # revision ids that messages, tokens or tail references are kept under
    indexed: list[tuple[str, str]] = field(default_factory=list)  # (session, revision)
    pins: list[tuple[str, str]] = field(default_factory=list)  # (revision, session)
    requests: set[str] = field(default_factory=set)  # their sessions


def collect(store: Store, pause: Pause) -> int:
    """Erase all garbage; returns how many things (each one or a few records). `pause` is called between steps."""
    return sum(finding.repaired for finding in garbage(store, pause, erase=True))


def garbage(store: Store, pause: Pause, *, erase: bool) -> Iterator[Finding]:
    """Every thing that nobody leads to; with `erase`, told when it is gone."""
    indexed: dict[str, list[str]] = {}
    for key in store.catalog.session_keys():
        indexed.setdefault(key.tenant, []).append(key.session_id)
    for tenant in store.log.tenants():
        with store.inflight.watch() as seen:
            listed = _candidates(store.log, tenant, pause)
            needed = reachable(store, tenant, indexed.get(tenant, ()), pause)
            yield from _cells(store, tenant, listed, needed, seen, pause, erase=erase)
            yield from _revisions(store, tenant, listed, needed, seen, pause, erase=erase)
    yield from _kv(store, pause, erase=erase)


def _candidates(log: LogStore, tenant: str, pause: Pause) -> _Candidates:
    found = _Candidates()
    for page in key_pages(log.environment, keys.tenant_prefix(tenant)):
        for key in page:
            _, kind, rest = keys.split(key)
            if kind == keys.CELL_REF:
                found.cells.append(rest)
            elif kind == keys.REVISION:
                found.revisions += keys.split_strings(rest)
            elif kind in (keys.MESSAGES, keys.TAIL_REF, keys.PRIOR):
                found.parts.update(keys.split_strings(rest))
            elif kind == keys.TOKENS:
                found.parts.update(keys.split_strings(rest[:-8]))
            elif kind == keys.REVISION_INDEX:
                session_id, revision_id = keys.split_strings(rest)
                found.indexed.append((session_id, revision_id))
            elif kind == keys.PIN:
                revision_id, session_id = keys.split_strings(rest)
                found.pins.append((revision_id, session_id))
            elif kind == keys.REQUEST:
                found.requests.add(keys.split_strings(rest)[0])
        pause()
    return found


def _cells(
    store: Store, tenant: str, listed: _Candidates, needed: Reachable, seen: set[bytes], pause: Pause, *, erase: bool
) -> Iterator[Finding]:
    """Sealed cells that no session's tokens lead to."""
    doomed = [] if needed.all_cells else [cell for cell in listed.cells if cell not in needed.cells]
    owners = {owner.name: owner for owner in (KVOwner(tenant, "cell", cell) for cell in doomed)}

    def act(names: list[bytes]) -> None:
        batch = LogBatch()
        for name in names:
            batch.delete_cell_ref(tenant, owners[name].id)
        gone.extend(owners[name] for name in names)
        store.log.write(batch).result()

    for names in _chunks(list(owners)):
        gone: list[KVOwner] = []
        if erase:
            store.inflight.unless_used(names, seen, act)
            delete_unreferenced(store, gone)
        else:
            gone = [owners[name] for name in names if name not in seen and is_referenced(store, owners[name])]
        for owner in gone:
            yield _notice(tenant, keys.cell_ref_key(tenant, owner.id), "no session leads to this cell", erase=erase)
        pause()


def _revisions(
    store: Store, tenant: str, listed: _Candidates, needed: Reachable, seen: set[bytes], pause: Pause, *, erase: bool
) -> Iterator[Finding]:
    """Revisions, parts of revisions and requests that belong to no session. All parts of one go in one change."""
    if needed.all_revisions:
        return
    log = store.log
    whole = [one for one in listed.revisions if one not in needed.revisions]
    parts = listed.parts - set(listed.revisions) - needed.revisions
    steps = [(keys.REVISION, one, "no session leads to this revision") for one in _children_first(log, tenant, whole)]
    steps += [(keys.TOKENS, one, "left by a turn that ended without a revision") for one in sorted(parts)]
    pinned = {session_id for _, session_id in listed.pins}
    names = {keys.record_key(tenant, keys.REVISION, one): (kind, one, why) for kind, one, why in steps}

    def act(free: list[bytes]) -> None:
        batch = LogBatch()
        for name in free:
            batch.expect_pins(tenant, names[name][1], pinned)
            batch.delete_revision(tenant, names[name][1])
        with contextlib.suppress(Aborted):  # a fork came between: next time
            store.log.write(batch).result()
            gone.extend(names[name] for name in free)

    for chunk in _chunks(list(names)):
        gone: list[tuple[int, str, str]] = []
        if erase:
            store.inflight.unless_used(chunk, seen, act)
        else:
            gone = [names[name] for name in chunk if name not in seen and _has_parts(log, tenant, names[name][1])]
        for kind, one, why in gone:
            yield _notice(tenant, keys.record_key(tenant, kind, one), why, erase=erase)
        pause()
    yield from _without_session(store, tenant, listed, needed, seen, erase=erase)


def _without_session(
    store: Store, tenant: str, listed: _Candidates, needed: Reachable, seen: set[bytes], *, erase: bool
) -> Iterator[Finding]:
    """Index entries, pins and requests of sessions that are not there.

    A purged session's index stays as long as forks of it need what it names.
    """
    log = store.log
    batch, found = LogBatch(), []

    def told(kind: int, *ids: str, what: str, session_id: str) -> None:
        key = keys.record_key(tenant, kind, *ids)
        found.append(_notice(tenant, key, f"{what} a session that is not there", session_id, erase=erase))

    for session_id, revision_id in listed.indexed:
        needs = session_id in needed.sessions or revision_id in needed.revisions
        used = keys.record_key(tenant, keys.REVISION, revision_id) in seen or _has_parts(log, tenant, revision_id)
        if not (needs or used) and revision_id in log.ids(tenant, keys.REVISION_INDEX, session_id):
            told(keys.REVISION_INDEX, session_id, revision_id, what="the index of", session_id=session_id)
            batch.delete_index(tenant, session_id, revision_id)
    for revision_id, session_id in listed.pins:
        used = session_id in needed.sessions or keys.record_key(tenant, keys.SESSION, session_id) in seen
        if not used and session_id in log.pins(tenant, revision_id):
            told(keys.PIN, revision_id, session_id, what="a pin for", session_id=session_id)
            batch.unpin_revision(tenant, revision_id, session_id)
    for session_id in sorted(listed.requests - needed.sessions):
        used = keys.record_key(tenant, keys.SESSION, session_id) in seen
        if not used and log.ids(tenant, keys.REQUEST, session_id):
            told(keys.REQUEST, session_id, what="requests of", session_id=session_id)
            batch.delete_requests(tenant, session_id)
    if erase and batch.ops:
        log.write(batch).result()
    yield from found


def _kv(store: Store, pause: Pause, *, erase: bool) -> Iterator[Finding]:
    """KV that no reference names."""
    suspects: list[KVOwner] = []

    def judged() -> list[KVOwner]:
        time.sleep(SECOND_LOOK_SECONDS)  # who deletes a reference deletes its KV next
        left = [owner for owner in suspects if store.blocks.holds(owner)]
        if erase:
            return delete_unreferenced(store, left)
        with store.inflight.watch() as seen:
            return [owner for owner in left if owner.name not in seen and not is_referenced(store, owner)]

    def told() -> Iterator[Finding]:
        for owner in judged() if suspects else []:
            yield _notice(owner.tenant, owner.prefix, "no reference names this KV", erase=erase)
        suspects.clear()

    for owner in kv_owners(store.blocks.environment):
        if not is_referenced(store, owner):
            suspects.append(owner)
        if len(suspects) == BATCH:
            yield from told()
        pause()
    yield from told()


def _children_first(log: LogStore, tenant: str, revisions: Sequence[str]) -> list[str]:
    """Those that can be read, each before its parent. A damaged one stays: what it was is lost, not unreferenced."""
    parents: dict[str, str | None] = {}
    for one in revisions:
        try:
            parents[one] = log.revision(tenant, one).parent
        except (RecordCorrupt, RevisionNotFound):
            continue
    depth: dict[str, int] = {}
    for one in parents:
        path, at = [], one
        while at in parents and at not in depth and at not in path:
            path.append(at)
            at = parents[at] or ""
        base = depth.get(at, 0)
        for above, member in enumerate(reversed(path), 1):
            depth[member] = base + above
    return sorted(parents, key=lambda one: -depth[one])


def _has_parts(log: LogStore, tenant: str, revision_id: str) -> bool:
    """Whether anything of a revision is left in the log."""
    with log.environment.read() as txn, txn.cursor() as cursor:
        for kind in (keys.REVISION, keys.MESSAGES, keys.TOKENS, keys.TAIL_REF, keys.PRIOR):
            prefix = keys.record_key(tenant, kind, revision_id)
            if cursor.set_range(prefix) and bytes(cursor.key()).startswith(prefix):
                return True
    return False


def _notice(tenant: str, key: bytes, message: str, session_id: str = "", *, erase: bool) -> Finding:
    return Finding(Severity.NOTICE, UNREFERENCED, tenant, key, message, session_id, repaired=erase)


def _chunks(names: list[bytes]) -> Iterator[list[bytes]]:
    for at in range(0, len(names), BATCH):
        yield names[at : at + BATCH]
