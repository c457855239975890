"""Moves of a session's KV between memory and disk: restoring (restoring.py), and persisting, off a turn's path."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from sessiond.backing import Backing
from sessiond.branch import Ids
from sessiond.cache import SessionCache
from sessiond.cachememory import CacheMemory
from sessiond.policies.prior import Prior
from sessiond.priors import find_prior, store_prior
from sessiond.references import cell_refs, joined_tails, tail_ref
from sessiond.restoring import Donor, Restoration, Restorer, leading
from sessiond.storage.batch import LogBatch
from sessiond.storage.codec import codec_for
from sessiond.storage.kv import KVOwner, encode_kv
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import CellRef, RevisionRecord, TailRef
from sessiond.storage.store import Store
from sessiond.types import KVShape, Span


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
        self.restorer = Restorer(store, shape, identity_id)
        self._workers, self._codecs = self.restorer.n_workers, self.restorer.pool
        self.memory = CacheMemory(shape, capacity, self._codecs, self._workers, store.root)
        # Forks share their head: two sessions may write its tail at once, and must not do so as one generation.
        self._writing_tail = [threading.Lock() for _ in range(16)]

    def close(self) -> None:
        self.memory.close()
        self._codecs.shutdown()

    def restore(
        self,
        tenant: str,
        chain: Sequence[RevisionRecord],
        ids: Ids,
        *,
        donor: Donor | None = None,
        share: bool = True,
        backing: Backing | None = None,
    ) -> tuple[SessionCache, Restoration]:
        """A cache holding as much of `ids` as is to be found (Restorer.fill), in `backing` if one is given."""
        began = time.perf_counter()
        cache = self.memory.take(len(ids), backing)
        report = self.restorer.fill(tenant, chain, ids, cache, donor=donor, share=share)
        cache.release_all()
        cache.prior = find_prior(self.store, tenant, chain, self.identity_id, self.shape)
        report.milliseconds = (time.perf_counter() - began) * 1e3
        return cache, report

    def warm_up(self, spare_bytes: int) -> None:
        """Make the first request as quick as the next: run each codec thread once, and map the spare memory."""
        frame = np.zeros((1, 8, 8), np.uint32 if self.shape.itemsize == 4 else np.uint16)
        probe = [(frame, frame)] * 2
        owner = KVOwner("default", "cell", b"warm-up")
        list(self._codecs.map(lambda _: encode_kv(owner, 0, probe, codec=self._codec), range(2 * self._workers)))
        self.memory.map_spare(spare_bytes)

    def persist_cells(
        self, tenant: str, ids: Ids, cache: SessionCache, stop: threading.Event, most: int | None = None
    ) -> int:
        """Make sealed cells of the history `ids` durable, those that are not on disk yet, until `stop` is set.

        At most `most` of them, if given. A suspended turn's cache reaches beyond the history. Returns bytes written.
        """
        last = min(cache.sealed, len(ids)) // self.cell_tokens
        hashes = prefix_hashes(tenant, self.identity_id, ids[: last * self.cell_tokens], self.cell_tokens)
        with self.store.inflight.hold(KVOwner(tenant, "cell", prefix_hash).name for prefix_hash in hashes):
            return self._write_unknown(tenant, hashes, cache, stop, most)

    def _write_unknown(
        self, tenant: str, hashes: Sequence[bytes], cache: SessionCache, stop: threading.Event, most: int | None
    ) -> int:
        known, _ = cell_refs(self.store, tenant, hashes)
        todo = [cell for cell in range(len(hashes)) if known[cell] is None][:most]
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
            cache.release_all()
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
        borrowed: int = 0,
    ) -> int:
        """Make provisional KV of a revision durable, then drop the tails of `replaces`. Returns bytes written.

        A tail that holds all of it and more stays instead. `borrowed`: as SessionCache.borrowed.
        """
        names = [KVOwner(tenant, "tail", one.encode()).name for one in (revision_id, *replaces)]
        with self.store.inflight.hold(names), self._writing_tail[hash(names[0]) % len(self._writing_tail)]:
            return self._write_tail(tenant, revision_id, start, arrays, replaces, borrowed)

    def _write_tail(
        self,
        tenant: str,
        revision_id: str,
        start: int,
        arrays: Sequence[tuple[Any, Any]],
        replaces: Sequence[str],
        borrowed: int,
    ) -> int:
        old, _ = tail_ref(self.store, tenant, revision_id)
        n_tokens = arrays[0][0].shape[1] if arrays else 0
        if old and old.start <= start and old.start + old.length > start + n_tokens:
            return 0  # a session that was rolled back and returned holds less than it had written
        generation = old.generation + 1 if old else 1
        log, written = LogBatch(), 0
        if n_tokens:
            coded = encode_kv(
                KVOwner(tenant, "tail", revision_id.encode(), generation), start, arrays, codec=self._codec
            )
            self.store.blocks.write(coded.records).result()
            written = coded.coded_bytes
            log.put_tail_ref(
                TailRef(
                    tenant=tenant,
                    revision_id=revision_id,
                    start=start,
                    length=n_tokens,
                    raw_bytes=coded.raw_bytes,
                    coded_bytes=coded.coded_bytes,
                    kv_digest=coded.kv_digest,
                    profile_id=self.profile_id,
                    generation=generation,
                    extra={"borrowed": borrowed} if borrowed > start else {},
                )
            )
        elif old:
            log.delete_tail_ref(tenant, revision_id)
        stale = [KVOwner(tenant, "tail", revision_id.encode(), old.generation)] if old else []
        for revision in replaces:
            ref, _ = tail_ref(self.store, tenant, revision)
            if ref and not self.store.log.pins(tenant, revision):  # a fork may need it
                log.delete_tail_ref(tenant, revision)
                stale.append(KVOwner(tenant, "tail", revision.encode(), ref.generation))
        if log.ops:
            self.store.log.write(log).result()
        for owner in stale:
            self.store.blocks.delete(owner).result()
        return written

    def persist_prior(self, tenant: str, chain: Sequence[RevisionRecord], prior: Prior) -> int:
        """Make a branch's scores durable. Returns bytes written. Raises RevisionNotFound if its head is gone."""
        return store_prior(self.store, tenant, chain, self.identity_id, self.shape, prior)

    def persisted_upto(self, tenant: str, chain: Sequence[RevisionRecord], ids: Ids) -> tuple[int, int]:
        """Tokens of a cold session's history whose sealed cells are on disk, and whose KV in any form is."""
        hashes = prefix_hashes(tenant, self.identity_id, ids, self.cell_tokens)
        sealed = leading(cell_refs(self.store, tenant, hashes, forget=False)[0]) * self.cell_tokens
        tails, _ = joined_tails(self.store, tenant, chain, sealed, len(ids), forget=False)
        return sealed, tails[-1].start + tails[-1].length if tails else sealed


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
