"""Moves of a session's KV between memory and disk.

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

from sessiond.branch import Ids
from sessiond.cache import SessionCache
from sessiond.cachememory import CacheMemory
from sessiond.errors import RecordCorrupt
from sessiond.references import cell_refs, tail_ref
from sessiond.storage.batch import LogBatch
from sessiond.storage.codec import codec_for
from sessiond.storage.kv import KVOwner, encode_kv
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import CellRef, RevisionRecord, TailRef
from sessiond.storage.store import Store
from sessiond.types import KVShape, Part, Span, Tier


@dataclass(frozen=True, slots=True)
class Recompute:
    """Tokens that a turn had to compute again, and why."""

    cause: str
    tokens: int
    detail: str = ""


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
        self._codecs = ThreadPoolExecutor(self._workers, thread_name_prefix="codec")
        self.memory = CacheMemory(shape, capacity, self._codecs, self._workers)

    def close(self) -> None:
        self._codecs.shutdown()

    def restore(self, tenant: str, chain: Sequence[RevisionRecord], ids: Ids) -> tuple[SessionCache, Restoration]:
        """A cache holding as much of the history `ids` as disk has. Raises RecordCorrupt only for a damaged log."""
        began = time.perf_counter()
        cache = self.memory.take(len(ids))
        report = Restoration()
        hashes = prefix_hashes(tenant, self.identity_id, ids, self.cell_tokens)
        refs, damaged = cell_refs(self.store, tenant, hashes)
        report.corrupt = next(iter(damaged.values()), "")
        n_cells = _leading(refs)
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
        """Make the first request as quick as the next: run each codec thread once, and map the spare memory."""
        frame = np.zeros((1, 8, 8), np.uint32 if self.shape.itemsize == 4 else np.uint16)
        probe = [(frame, frame)] * 2
        owner = KVOwner("default", "cell", b"warm-up")
        list(self._codecs.map(lambda _: encode_kv(owner, 0, probe, codec=self._codec), range(2 * self._workers)))
        self.memory.map_spare(spare_bytes)

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
            ref, why = tail_ref(self.store, tenant, revision.revision_id)
            report.corrupt = why or report.corrupt
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
        with self.store.inflight.hold(KVOwner(tenant, "cell", prefix_hash).name for prefix_hash in hashes):
            return self._write_unknown(tenant, hashes, cache, stop)

    def _write_unknown(self, tenant: str, hashes: Sequence[bytes], cache: SessionCache, stop: threading.Event) -> int:
        known, _ = cell_refs(self.store, tenant, hashes)
        todo = [cell for cell in range(len(hashes)) if known[cell] is None]
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
        with self.store.inflight.hold([KVOwner(tenant, "tail", revision_id.encode()).name]):
            return self._write_tail(tenant, revision_id, start, arrays, replaces)

    def _write_tail(
        self,
        tenant: str,
        revision_id: str,
        start: int,
        arrays: Sequence[tuple[Any, Any]],
        replaces: Sequence[str],
    ) -> int:
        old, _ = tail_ref(self.store, tenant, revision_id)
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
            ref, _ = tail_ref(self.store, tenant, revision)
            if ref:
                log.delete_tail_ref(tenant, revision)
                stale.append(KVOwner(tenant, "tail", revision.encode(), ref.generation))
        if log.ops:
            self.store.log.write(log).result()
        for owner in stale:
            self.store.blocks.delete(owner).result()
        return written

    def persisted_upto(self, tenant: str, chain: Sequence[RevisionRecord], ids: Ids) -> tuple[int, int]:
        """Tokens of a cold session's history whose sealed cells are on disk, and whose KV in any form is."""
        hashes = prefix_hashes(tenant, self.identity_id, ids, self.cell_tokens)
        sealed = _leading(cell_refs(self.store, tenant, hashes, forget=False)[0]) * self.cell_tokens
        for revision in reversed(chain):
            ref, _ = tail_ref(self.store, tenant, revision.revision_id, forget=False)
            if ref and ref.start <= sealed:
                return sealed, max(sealed, ref.start + ref.length)
        return sealed, sealed


def _into(cache: SessionCache, span: Span) -> Any:
    def out(layer: int, part: Part) -> np.ndarray[Any, Any]:
        return cache.array(layer, int(part), span)

    return out


def _leading(refs: Sequence[CellRef | None]) -> int:
    """How many references come before the first gap."""
    return next((i for i, ref in enumerate(refs) if ref is None), len(refs))


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
