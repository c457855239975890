"""Moves of a session's KV between memory and disk, and what is kept in memory.

Restoring reads sealed cells by their prefix hash and the head's provisional tail; what is missing or damaged is left to
be computed from the token log. Persisting goes the other way, after a turn and off its path.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sessiond.cache import SessionCache
from sessiond.errors import RecordCorrupt
from sessiond.storage.batch import LogBatch
from sessiond.storage.codec import codec_for
from sessiond.storage.kv import KVOwner, encode_kv
from sessiond.storage.log import LogStore
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import CellRef, RevisionRecord, TailRef
from sessiond.storage.store import Store
from sessiond.types import KVShape, Part, Span, Tier

Ids = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True, slots=True)
class Recompute:
    """Tokens that a turn had to compute again, and why."""

    cause: str
    tokens: int
    detail: str = ""


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


@dataclass(slots=True)
class Restoration:
    """What it took to make a session hot."""

    tier: Tier = Tier.DISK
    bytes_read: int = 0
    milliseconds: float = 0.0
    tokens_restored: int = 0
    corrupt: str = ""
    recomputed: list[Recompute] = field(default_factory=list)


class Tiers:
    """Reads and writes KV of one model's sessions. Methods block; they run in pools, never on the event loop."""

    def __init__(self, store: Store, shape: KVShape, capacity: int, identity_id: str, profile_id: str) -> None:
        self.store = store
        self.shape = shape
        self.capacity = capacity
        self._codec = codec_for(shape.dtype)
        self.identity_id = identity_id
        self.profile_id = profile_id
        self.cell_tokens = store.cell_tokens
        self._workers = max(2, os.cpu_count() or 1)
        self._spare: SessionCache | None = None
        self._spare_allowed = False
        self._spare_lock = threading.Lock()
        self._codecs = ThreadPoolExecutor(self._workers, thread_name_prefix="codec")

    def close(self) -> None:
        self._codecs.shutdown()

    def restore(self, tenant: str, chain: Sequence[RevisionRecord], ids: Ids) -> tuple[SessionCache, Restoration]:
        """A cache holding as much of the history `ids` as disk has. Raises RecordCorrupt only for a damaged log."""
        began = time.perf_counter()
        cache = self._take_cache(len(ids))
        report = Restoration()
        hashes = prefix_hashes(tenant, self.identity_id, ids, self.cell_tokens)
        n_cells = _leading(self.store.log.cell_refs(tenant, hashes))
        # The tail goes first: where it reaches below the sealed cells, they overwrite it.
        tail_end = self._read_tail(tenant, chain, cache, n_cells * self.cell_tokens, len(ids), report)
        n_cells = self._read_cells(tenant, hashes[:n_cells], cache, report)
        cache.sealed = n_cells * self.cell_tokens
        tail_start, tail_stop = tail_end
        cache.length = max(cache.sealed, tail_stop if tail_start <= cache.sealed else 0)
        report.tokens_restored = cache.length
        report.milliseconds = (time.perf_counter() - began) * 1e3
        return cache, report

    def warm_up(self, spare_bytes: int) -> None:
        """Map memory for one long session ahead, if it takes at most `spare_bytes`, and run each codec thread once.

        Fresh memory costs more than what is read into it: 10 to 400 ms for 6,000 tokens of the default model.
        """
        frame = np.zeros((1, 8, 8), np.uint32 if self.shape.itemsize == 4 else np.uint16)
        probe = [(frame, frame)] * 2
        owner = KVOwner("default", "cell", b"warm-up")
        list(self._codecs.map(lambda _: encode_kv(owner, 0, probe, codec=self._codec), range(2 * self._workers)))
        if self.shape.bytes_per_token * self.capacity <= spare_bytes:
            self._spare_allowed = True
            self._spare = self._map_cache(self.capacity)

    def _take_cache(self, length: int) -> SessionCache:
        """Memory for a session of `length` tokens: a long one gets the spare, if it is there."""
        if 2 * length < self.capacity:
            return SessionCache(self.shape, self.capacity)
        with self._spare_lock:
            spare, self._spare = self._spare, None
        return spare or self._map_cache(length)

    def _map_cache(self, length: int) -> SessionCache:
        cache = SessionCache(self.shape, self.capacity)
        cache.use_huge_pages(length)
        n, parts = self.shape.n_layers, self._workers
        stripes = [range(n * i // parts, n * (i + 1) // parts) for i in range(parts)]
        list(self._codecs.map(lambda layers: cache.populate(layers, length), stripes))
        return cache

    def give_back(self, cache: SessionCache) -> None:
        """Keep a long session's memory as the spare, cleared, unless there is one. Nobody else may hold the cache."""
        with self._spare_lock:
            wanted = self._spare is None and self._spare_allowed and cache.is_huge
        if wanted:
            cache.clear()
            with self._spare_lock:
                self._spare = cache

    def _read_cells(self, tenant: str, hashes: Sequence[bytes], cache: SessionCache, report: Restoration) -> int:
        """Fill cells in parallel; returns how many leading cells are good."""
        stripes = [range(i, len(hashes), self._workers) for i in range(min(self._workers, len(hashes)))]
        futures = [self._codecs.submit(self._read_stripe, tenant, hashes, stripe, cache) for stripe in stripes]
        good = len(hashes)
        for future in futures:
            n_bytes, bad, why = future.result()
            report.bytes_read += n_bytes
            if bad < good:
                good, report.corrupt = bad, why
        return good

    def _read_stripe(
        self, tenant: str, hashes: Sequence[bytes], cells: range, cache: SessionCache
    ) -> tuple[int, int, str]:
        """Bytes read, and the first bad cell with the reason (or the number of cells and nothing)."""
        total = 0
        for cell in cells:
            start = cell * self.cell_tokens
            span = Span(start, start + self.cell_tokens)
            owner = KVOwner(tenant, "cell", hashes[cell])
            try:
                total += self.store.blocks.read_into(owner, start, len(span), self.shape.n_layers, _into(cache, span))
            except RecordCorrupt as error:
                # Without its reference the cell is written again once it has been recomputed.
                forget = LogBatch()
                forget.delete_cell_ref(tenant, hashes[cell])
                self.store.log.write(forget).result()
                return total, cell, error.message
        return total, len(hashes), ""

    def _read_tail(
        self,
        tenant: str,
        chain: Sequence[RevisionRecord],
        cache: SessionCache,
        sealed: int,
        n_ids: int,
        report: Restoration,
    ) -> tuple[int, int]:
        """Read the newest tail of the branch that reaches beyond `sealed`; returns its span, or (0, 0)."""
        for revision in reversed(chain):
            if revision.position_end <= sealed:
                break
            ref = self.store.log.tail_ref(tenant, revision.revision_id)
            if ref is None:
                continue
            stop = ref.start + ref.length
            if ref.start > sealed or stop <= sealed or stop > n_ids:
                break
            owner = KVOwner(tenant, "tail", revision.revision_id.encode(), ref.generation)
            try:
                report.bytes_read += self.store.blocks.read_into(
                    owner, ref.start, ref.length, self.shape.n_layers, _into(cache, Span(ref.start, stop))
                )
            except RecordCorrupt as error:
                report.corrupt = error.message
                break
            return ref.start, stop
        return 0, 0

    def persist_cells(self, tenant: str, ids: Ids, cache: SessionCache, stop: threading.Event) -> int:
        """Make sealed cells of the history `ids` durable, those that are not on disk yet, until `stop` is set.

        A suspended turn's cache reaches beyond the history. Returns bytes written.
        """
        last = min(cache.sealed, len(ids)) // self.cell_tokens
        hashes = prefix_hashes(tenant, self.identity_id, ids[: last * self.cell_tokens], self.cell_tokens)
        known = self.store.log.cell_refs(tenant, hashes)
        todo = [cell for cell in range(last) if known[cell] is None]
        written = 0
        for batch in _chunks(todo, 2 * self._workers):
            if stop.is_set():
                break
            refs = list(self._codecs.map(lambda cell: self._write_cell(tenant, hashes[cell], cell, cache), batch))
            log = LogBatch()
            for ref, durable in refs:
                durable.result()
                log.put_cell_ref(ref)
                written += ref.coded_bytes
            self.store.log.write(log).result()
        return written

    def _write_cell(
        self, tenant: str, prefix_hash: bytes, cell: int, cache: SessionCache
    ) -> tuple[CellRef, Future[None]]:
        start = cell * self.cell_tokens
        owner = KVOwner(tenant, "cell", prefix_hash)
        coded = encode_kv(owner, start, cache.arrays(Span(start, start + self.cell_tokens)), codec=self._codec)
        ref = CellRef(
            tenant=tenant,
            prefix_hash=prefix_hash,
            index=cell,
            start=start,
            n_tokens=self.cell_tokens,
            n_records=len(coded.records),
            raw_bytes=coded.raw_bytes,
            coded_bytes=coded.coded_bytes,
            kv_digest=coded.kv_digest,
            profile_id=self.profile_id,
        )
        return ref, self.store.blocks.write(coded.records)

    def persist_tail(
        self,
        tenant: str,
        revision_id: str,
        start: int,
        arrays: Sequence[tuple[Any, Any]],
        replaces: Sequence[str],
    ) -> int:
        """Make provisional KV of a revision durable, then drop the tails of `replaces`. Returns bytes written."""
        old = self.store.log.tail_ref(tenant, revision_id)
        generation = old.generation + 1 if old else 1
        log, written = LogBatch(), 0
        if arrays and arrays[0][0].shape[1]:
            coded = encode_kv(
                KVOwner(tenant, "tail", revision_id.encode(), generation), start, arrays, codec=self._codec
            )
            self.store.blocks.write(coded.records).result()
            length = arrays[0][0].shape[1]
            written = coded.coded_bytes
            log.put_tail_ref(
                TailRef(
                    tenant=tenant,
                    revision_id=revision_id,
                    start=start,
                    length=length,
                    raw_bytes=coded.raw_bytes,
                    coded_bytes=coded.coded_bytes,
                    kv_digest=coded.kv_digest,
                    profile_id=self.profile_id,
                    generation=generation,
                )
            )
        elif old:
            log.delete_tail_ref(tenant, revision_id)
        stale = [KVOwner(tenant, "tail", revision_id.encode(), old.generation)] if old else []
        for revision in replaces:
            ref = self.store.log.tail_ref(tenant, revision)
            if ref:
                log.delete_tail_ref(tenant, revision)
                stale.append(KVOwner(tenant, "tail", revision.encode(), ref.generation))
        if log.ops:
            self.store.log.write(log).result()
        for owner in stale:
            self.store.blocks.delete(owner).result()
        return written

    def erase(self, tenant: str, session_id: str) -> int:
        """Delete a session, its revisions and requests, and the KV that no other session of the tenant uses.

        References go first, in one transaction: a death in between leaves unreferenced blocks, no dangling reference.
        Returns the bytes of KV freed.
        """
        log = self.store.log
        kept, kept_cells = self._reachable(tenant, session_id)
        own = [r for r in log.revisions_of_session(tenant, session_id) if r.revision_id not in kept]
        parents = {revision.parent for revision in own}
        cells: set[bytes] = set()
        for leaf in (r for r in own if r.revision_id not in parents):
            cells |= self._cells_of(tenant, leaf.revision_id, self.identity_id)
        refs = [ref for ref in log.cell_refs(tenant, sorted(cells - kept_cells)) if ref]
        tails = [ref for ref in (log.tail_ref(tenant, r.revision_id) for r in own) if ref]
        batch = LogBatch()
        for revision in own:
            batch.delete_revision(tenant, revision.revision_id)
        for ref in refs:
            batch.delete_cell_ref(tenant, ref.prefix_hash)
        batch.delete_requests(tenant, session_id)
        batch.delete_session(tenant, session_id)
        log.write(batch).result()
        for ref in refs:
            self.store.blocks.delete(KVOwner(tenant, "cell", ref.prefix_hash)).result()
        for tail in tails:
            self.store.blocks.delete(KVOwner(tenant, "tail", tail.revision_id.encode(), tail.generation)).result()
        return sum(ref.coded_bytes for ref in refs) + sum(tail.coded_bytes for tail in tails)

    def _reachable(self, tenant: str, without: str) -> tuple[set[str], set[bytes]]:
        """Revisions and cells that the tenant's other sessions need."""
        revisions: set[str] = set()
        cells: set[bytes] = set()
        after: tuple[str, str] | None = None
        while page := self.store.log.sessions(tenant, after):
            for record in page:
                after = (record.tenant, record.session_id)
                if record.session_id != without:
                    chain = self.store.log.chain(tenant, record.head_revision)
                    revisions |= {revision.revision_id for revision in chain}
                    cells |= self._cells_of(tenant, record.head_revision, record.identity_id)
        return revisions, cells

    def _cells_of(self, tenant: str, head: str, identity_id: str) -> set[bytes]:
        _, ids = read_branch(self.store.log, tenant, head)
        return set(prefix_hashes(tenant, identity_id, ids, self.cell_tokens))

    def disk_usage(self) -> DiskTotals:
        """Walks all records of the log: for operators, not for a hot path."""
        log = self.store.log
        sessions = deleted = suspended = raw = coded = 0
        for tenant in log.tenants():
            after: tuple[str, str] | None = None
            while page := log.sessions(tenant, after):
                after = (page[-1].tenant, page[-1].session_id)
                sessions += len(page)
                deleted += sum(record.deleted_us is not None for record in page)
                suspended += sum("open_request" in record.extra for record in page)
                tails = [log.tail_ref(tenant, record.head_revision) for record in page]
                raw += sum(ref.raw_bytes for ref in tails if ref)
                coded += sum(ref.coded_bytes for ref in tails if ref)
            cells = log.all_cell_refs(tenant)
            raw += sum(ref.raw_bytes for ref in cells)
            coded += sum(ref.coded_bytes for ref in cells)
        log_stat, block_stat = log.stat(), self.store.blocks.stat()
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

    def persisted_upto(self, tenant: str, chain: Sequence[RevisionRecord], ids: Ids) -> tuple[int, int]:
        """Tokens of a cold session's history whose sealed cells are on disk, and whose KV in any form is."""
        hashes = prefix_hashes(tenant, self.identity_id, ids, self.cell_tokens)
        sealed = _leading(self.store.log.cell_refs(tenant, hashes)) * self.cell_tokens
        for revision in reversed(chain):
            ref = self.store.log.tail_ref(tenant, revision.revision_id)
            if ref and ref.start <= sealed:
                return sealed, max(sealed, ref.start + ref.length)
        return sealed, sealed


def read_branch(log: LogStore, tenant: str, head: str) -> tuple[list[RevisionRecord], Ids]:
    """Revisions root..head and their joined token ids. Raises RevisionNotFound or RecordCorrupt."""
    chain = log.chain(tenant, head)
    parts = [log.tokens(tenant, r.revision_id, r.log_end - r.log_start)[0] for r in chain]
    return chain, np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def _into(cache: SessionCache, span: Span) -> Any:
    def out(layer: int, part: Part) -> np.ndarray[Any, Any]:
        return cache.array(layer, int(part), span)

    return out


def _leading(refs: Sequence[CellRef | None]) -> int:
    """How many references come before the first gap."""
    return next((i for i, ref in enumerate(refs) if ref is None), len(refs))


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
