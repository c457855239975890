"""A scan of the whole store, or of what some sessions lead to: every record, every reference, the SQL index.

It runs in a thread of its own, beside turns; it reads in pages, and holds no transaction while it works or waits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass, field

from sessiond.collector import garbage
from sessiond.errors import RecordCorrupt, SessionNotFound
from sessiond.mending import mend
from sessiond.reachability import reachable_from
from sessiond.secondlook import judge, log_findings, owner_findings, referred, row_findings, stray_findings
from sessiond.storage import keys
from sessiond.storage.catalog import SessionRow
from sessiond.storage.crossrefs import findings_of
from sessiond.storage.environment import Environment
from sessiond.storage.findings import CHECKSUM, Finding, Severity
from sessiond.storage.kv import KVOwner
from sessiond.storage.records import CellRef, TailRef
from sessiond.storage.rows import SessionKey
from sessiond.storage.scan import Checked, check_kv_record, check_log_record, owner_of, pages
from sessiond.storage.store import Store

SECOND_LOOK_SECONDS = 0.1
PROGRESS_SECONDS = 1.0

Pause = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """Records and bytes read so far, and about how many records there are."""

    records: int
    total: int
    n_bytes: int


@dataclass(slots=True)
class Scope:
    """Where to look: keys of the log and of blocks by their prefixes, and sessions of the index. None: everywhere."""

    log: list[bytes] = field(default_factory=lambda: [b""])
    blocks: list[bytes] = field(default_factory=lambda: [b""])
    sessions: list[SessionKey] | None = None


def scope_of(store: Store, session_ids: Iterable[str]) -> Scope:
    """What these sessions lead to, whichever tenant's they are. Raises SessionNotFound."""
    scope = Scope([], [], [])
    assert scope.sessions is not None
    for session_id in session_ids:
        tenants = [tenant for tenant in store.log.tenants() if store.log.has_session(tenant, session_id)]
        tenants += [key.tenant for key in store.lost if key.session_id == session_id and key.tenant not in tenants]
        if not tenants:
            raise SessionNotFound(f"no session {session_id}")
        for tenant in tenants:
            scope.sessions.append(SessionKey(tenant, session_id))
            _add_session(store, scope, tenant, session_id)
    scope.log, scope.blocks = sorted(set(scope.log)), sorted(set(scope.blocks))
    return scope


def _add_session(store: Store, scope: Scope, tenant: str, session_id: str) -> None:
    found = reachable_from(store, tenant, session_id)
    for kind in (keys.SESSION, keys.REVISION_INDEX, keys.REQUEST):
        scope.log.append(keys.record_key(tenant, kind, session_id))
    for revision_id in found.revisions:
        for kind in (keys.REVISION, keys.MESSAGES, keys.TOKENS, keys.TAIL_REF, keys.PRIOR):
            scope.log.append(keys.record_key(tenant, kind, revision_id))
        scope.blocks.append(KVOwner(tenant, "tail", revision_id.encode()).every_generation)
    for cell in found.cells:
        scope.log.append(keys.cell_ref_key(tenant, cell))
        scope.blocks.append(KVOwner(tenant, "cell", cell).every_generation)


class Verification:
    """One run. `pause` is called between pages: it waits while turns are to go first, and raises to end the run."""

    def __init__(self, store: Store, pause: Pause, scope: Scope | None = None, *, repair: bool = False) -> None:
        self.store = store
        self.pause = pause
        self.scope = scope or Scope()
        self.repair = repair
        self.records = 0
        self.n_bytes = 0
        self.counts: Counter[Severity] = Counter()
        self.repaired = 0
        self._told: set[tuple[str, bytes, str]] = set()
        self._last_progress = time.monotonic()

    def run(self) -> Generator[Finding | Progress]:
        """Findings, each once, and progress about once a second."""
        whole = self.scope.sessions is None
        total = 0
        if whole:
            total = self.store.log.stat().entries + self.store.blocks.stat().entries
        yield Progress(0, total, 0)
        for part in (self._log, self._blocks, self._index):
            for step in part():
                yield from self._told_once(step) if isinstance(step, Finding) else self._progress(total)
        if whole:
            for step in garbage(self.store, self.pause, erase=self.repair):
                yield from self._told_once(step)
        yield Progress(self.records, max(total, self.records), self.n_bytes)

    def _told_once(self, finding: Finding) -> Iterator[Finding]:
        """The finding, mended if it is to be, unless it was told before."""
        name = (finding.kind, finding.key, finding.session_id if not finding.key else "")
        if name in self._told:
            return
        self._told.add(name)
        if self.repair and not finding.repaired:
            finding = mend(self.store, finding)
        self.count(finding)
        yield finding

    def count(self, finding: Finding) -> None:
        """Add a finding to the totals."""
        self.counts[finding.severity] += 1
        self.repaired += finding.repaired

    def _progress(self, total: int) -> Iterator[Progress]:
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            yield Progress(self.records, max(total, self.records), self.n_bytes)

    def _log(self) -> Iterator[Finding | None]:
        """Findings about the log; None after a page."""
        suspects: list[bytes] = []
        env = self.store.log.environment
        for page in self._pages(env, self.scope.log):
            if isinstance(page, Finding):
                yield page
                continue
            for key, value in page:
                checked = self._count(check_log_record(key, value))
                with env.read() as txn:
                    wrong = bool(findings_of(txn, checked))
                if wrong or not self._has_kv(checked):
                    suspects.append(key)
            yield None
        self._wait(suspects)
        for key in suspects:
            yield from log_findings(self.store, key)

    def _has_kv(self, checked: Checked) -> bool:
        if isinstance(checked.record, CellRef | TailRef):
            owner = referred(self.store, checked.key)
            return owner is None or self.store.blocks.holds(owner)
        return True

    def _blocks(self) -> Iterator[Finding | None]:
        """Findings about KV; None after a page."""
        suspects: list[KVOwner] = []
        strays: list[bytes] = []
        owner: KVOwner | None = None
        records: list[Checked] = []

        def judged() -> None:
            if owner is not None and judge(self.store, owner, records):
                suspects.append(owner)
            records.clear()

        for page in self._pages(self.store.blocks.environment, self.scope.blocks):
            if isinstance(page, Finding):
                yield page
                continue
            for key, value in page:
                checked = self._count(check_kv_record(key, value))
                try:
                    whose = owner_of(key)
                except (ValueError, IndexError):
                    strays.append(key)
                    continue
                if whose != owner:
                    judged()
                    owner = whose
                records.append(checked)
            yield None
        judged()
        self._wait([*suspects, *strays])
        for suspect in suspects:
            yield from owner_findings(self.store, suspect)
        for key in strays:
            yield from stray_findings(self.store, key)

    def _index(self) -> Iterator[Finding | None]:
        """Findings about the SQL index; None after a page."""
        suspects: set[SessionKey] = set()
        log, catalog = self.store.log, self.store.catalog
        wanted = self.scope.sessions
        after: tuple[str, str] | None = None
        while page := log.sessions(None, after, on_corrupt=_told_by_the_log):
            after = (page[-1].tenant, page[-1].session_id)
            lagging = catalog.lagging([SessionRow.of(record) for record in page])
            suspects.update(SessionKey(row.tenant, row.session_id) for row in lagging)
            yield None
            self.pause()
        suspects |= {key for key in catalog.session_keys() if not log.has_session(key.tenant, key.session_id)}
        if wanted is not None:
            suspects &= set(wanted)
        self._wait(suspects)
        for key in sorted(suspects):
            yield from row_findings(self.store, key.tenant, key.session_id)

    def _pages(self, env: Environment, prefixes: list[bytes]) -> Iterator[list[tuple[bytes, bytes]] | Finding]:
        """Pages of all records under these prefixes; a finding where the environment's own structure is damaged."""
        for prefix in prefixes:
            try:
                for page in pages(env, prefix):
                    yield page
                    self.pause()
            except RecordCorrupt as error:
                message = f"the file's structure is damaged: {error.message}"
                yield Finding(Severity.LOSS, CHECKSUM, "", prefix, message)

    def _count(self, checked: Checked) -> Checked:
        self.records += 1
        self.n_bytes += checked.n_bytes
        return checked

    def _wait(self, suspects: Collection[object]) -> None:
        """Let what was being written or deleted come to its end, before the second look."""
        if suspects:
            time.sleep(SECOND_LOOK_SECONDS)


def _told_by_the_log(_: RecordCorrupt) -> None:
    """A damaged session record is the log's finding."""
