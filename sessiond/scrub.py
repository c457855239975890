"""The background scrub: reads the whole store again and again, so that damage is found before it is needed.

It starts anywhere and goes round; it remembers nothing durable. Damaged KV loses its reference and is computed again
when it is wanted; damage of the log is counted and told, once for each record.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import structlog

from sessiond.errors import DiskFull, RecordCorrupt, StoreReadOnly
from sessiond.mending import mend
from sessiond.secondlook import log_findings, owner_findings, stray_findings
from sessiond.storage import keys
from sessiond.storage.environment import Environment
from sessiond.storage.findings import Finding, Severity
from sessiond.storage.scan import check_kv_record, check_log_record, owner_of, pages
from sessiond.storage.store import Store

logger = structlog.get_logger()


class Scrub:
    """One endless pass over a store, a page at a time. Not thread-safe: one caller at a time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.n_bytes = 0  # read so far
        self.rounds = 0  # times it has been through everything
        self.repaired = 0  # damaged KV and index entries mended
        self.losses = 0  # damaged records of the log, each counted once
        self._known: set[bytes] = set()
        self._steps = self._round(anywhere(store))

    def step(self) -> int:
        """Check the next page and mend what can be; returns its bytes, 0 at the end of a round."""
        n_bytes = next(self._steps, 0)
        if n_bytes == 0:
            self.rounds += 1
            self._steps = self._round(b"")
        self.n_bytes += n_bytes
        return n_bytes

    def _round(self, start: bytes) -> Iterator[int]:
        """Everything from the key `start` on, first KV, then the log."""
        for env in (self.store.blocks.environment, self.store.log.environment):
            try:
                for page in pages(env, start=start):
                    for key, value in page:
                        self._check(env, key, value)
                    yield sum(len(value) for _, value in page)
            except RecordCorrupt as error:  # of the file itself: what follows there cannot be reached
                self._lost(start, error.message)
            start = b""

    def _check(self, env: Environment, key: bytes, value: bytes) -> None:
        is_log = env is self.store.log.environment
        if not (check_log_record if is_log else check_kv_record)(key, value).damage:
            return
        if is_log:
            found = log_findings(self.store, key)
        else:
            try:
                found = owner_findings(self.store, owner_of(key))
            except (ValueError, IndexError):
                found = stray_findings(self.store, key)
        for finding in found:
            self._handle(finding)

    def _handle(self, finding: Finding) -> None:
        if finding.severity is Severity.LOSS:
            self._lost(finding.key, finding.message, finding.session_id)
            return
        logger.error("damage found by the scrub", record=keys.readable(finding.key), error=finding.message)
        try:
            self.repaired += mend(self.store, finding).repaired
        except (DiskFull, StoreReadOnly) as error:  # what comes after it is looked at all the same
            logger.error("not mended", record=keys.readable(finding.key), error=error.message)

    def _lost(self, key: bytes, message: str, session_id: str = "") -> None:
        if key not in self._known:
            self._known.add(key)
            self.losses += 1
            logger.error("loss found by the scrub", record=keys.readable(key), session=session_id, error=message)


def anywhere(store: Store) -> bytes:
    """A random key of KV: a daemon that restarts often must not check the same beginning each time."""
    tenants = store.log.tenants()
    if not tenants:
        return b""
    kind = secrets.choice((keys.KV_CELL, keys.KV_TAIL))
    return keys.kind_prefix(secrets.choice(tenants), kind) + bytes((16,)) + secrets.token_bytes(16)
