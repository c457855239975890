"""Filling a session's cache from what is there already: its own KV on disk, equal KV of other sessions and branches.

    [0, sealed)          cells, by their prefix hash: from another hot session's memory, else from disk
    [sealed, length)     provisional KV of the branch: its tail on disk, or a relative's KV of the same revisions

KV of a token depends on nothing behind it: what a branch holds of revisions that another shares is as good there. What
is missing or damaged is left to be computed from the token log.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sessiond.branch import Ids, computed_upto, read_branch
from sessiond.cache import SessionCache
from sessiond.errors import RecordCorrupt, RevisionNotFound
from sessiond.references import cell_refs, joined_tails, tail_ref
from sessiond.storage.batch import LogBatch
from sessiond.storage.kv import KVOwner
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import CellRef, RevisionRecord
from sessiond.storage.store import Store
from sessiond.tree import leaves_behind
from sessiond.types import KVShape, Part, Span, Tier

# Branches that may hold KV of the same revisions are tried in turn; more are not worth reading.
MOST_RELATIVES = 4


@dataclass(frozen=True, slots=True)
class Recompute:
    """Tokens that a turn had to compute again, and why."""

    cause: str
    tokens: int
    detail: str = ""


@dataclass(slots=True)
class Restoration:
    """What it took to make a session hot, or to go on with what another session has computed."""

    tier: Tier = Tier.DISK
    bytes_read: int = 0
    milliseconds: float = 0.0
    tokens_restored: int = 0
    corrupt: str = ""
    recomputed: list[Recompute] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Donor:
    """Another hot session of the tenant whose first `sealed` positions hold the same tokens, sealed.

    Its memory belongs to others: what is copied counts only if `epoch` is still its epoch afterwards.
    """

    cache: SessionCache
    epoch: int
    sealed: int

    @property
    def is_whole(self) -> bool:
        return self.cache.epoch == self.epoch


class Restorer:
    """Reads KV of one model's sessions. Methods block; they run in pools, never on the event loop."""

    def __init__(self, store: Store, shape: KVShape, identity_id: str) -> None:
        self.store = store
        self.shape = shape
        self.identity_id = identity_id
        self.cell_tokens = store.cell_tokens
        self.n_workers = max(2, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.n_workers, thread_name_prefix="codec")

    def fill(
        self,
        tenant: str,
        chain: Sequence[RevisionRecord],
        ids: Ids,
        cache: SessionCache,
        *,
        donor: Donor | None = None,
        share: bool = True,
    ) -> Restoration:
        """Bring `cache` as far along `ids` as KV is to be found: the history of `chain`, then tokens about to be fed.

        Of the latter only sealed cells are looked for. `share` off: the branch's own tail only. Raises RecordCorrupt
        only for a damaged log.
        """
        began = time.perf_counter()
        report, before = Restoration(), cache.length
        n_history = min(chain[-1].position_end if chain else 0, len(ids))
        hashes = prefix_hashes(tenant, self.identity_id, ids, self.cell_tokens) if share else []
        first = cache.sealed // self.cell_tokens
        n_live = max(first, min(donor.sealed // self.cell_tokens, len(hashes))) if donor else first
        refs, damaged = cell_refs(self.store, tenant, hashes[first:])
        report.corrupt = next(iter(damaged.values()), "")
        planned = n_live + leading(refs[n_live - first :])
        if cache.sealed < cache.length and planned > first:
            cache.epoch += 1  # cells will overwrite provisional KV: whoever copies that must not keep it
            cache.about_to_change(first * self.cell_tokens)
        cache.wrote(max(planned * self.cell_tokens, n_history))
        # The tail goes first: where it reaches below the sealed cells, they overwrite it.
        tail_end, borrowed = 0, cache.borrowed
        if cache.length < n_history:
            sealed = planned * self.cell_tokens
            tail_end, borrowed = self._read_tails(tenant, chain, cache, sealed, n_history, report)
        if donor and n_live > first and not self._copy_cells(donor, cache, range(first, n_live), report):
            n_live = first
        n_cells = self._read_cells(tenant, hashes, cache, n_live, leading(refs[n_live - first :]), report)
        cache.sealed = n_cells * self.cell_tokens
        if n_cells < planned:  # behind the last good cell, what stood there was written over
            cache.length, tail_end = min(cache.length, cache.sealed), 0
        cache.length = max(cache.length, cache.sealed, tail_end)
        cache.borrowed = min(max(borrowed, cache.borrowed), cache.length // self.cell_tokens * self.cell_tokens)
        # Beyond what the branch's own turns computed, others fed its last token in a step of other shapes.
        own = ids[: min(n_history, computed_upto(chain))]
        if cache.length < len(own):
            self._read_relatives(tenant, chain, own, cache, report, share=share)
        report.tokens_restored = cache.length - before
        report.milliseconds = (time.perf_counter() - began) * 1e3
        return report

    def _copy_cells(self, donor: Donor, cache: SessionCache, cells: range, report: Restoration) -> bool:
        """Copy sealed cells out of another session's memory; False if it changed meanwhile."""
        span = Span(cells.start * self.cell_tokens, cells.stop * self.cell_tokens)
        list(self.pool.map(lambda layer: cache.copy_from(donor.cache, layer, span), range(self.shape.n_layers)))
        if donor.is_whole:
            report.tier = Tier.DEVICE
            return True
        return False

    def _read_cells(
        self, tenant: str, hashes: Sequence[bytes], cache: SessionCache, first: int, count: int, report: Restoration
    ) -> int:
        """Fill `count` cells from `first` on in parallel; returns the first one that is not good."""
        good = first + count
        if count == 0:
            return good
        n_stripes = min(self.n_workers, count)
        stripes = [range(first + i, good, n_stripes) for i in range(n_stripes)]
        futures = [self.pool.submit(self._read_stripe, tenant, hashes, stripe, cache) for stripe in stripes]
        for future in futures:
            n_bytes, bad, why = future.result()
            report.bytes_read += n_bytes
            if bad < good:
                good, report.corrupt = bad, why
        report.tier = Tier.DISK
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
                total += self.store.blocks.read_into(owner, start, len(span), self.shape.n_layers, into(cache, span))
            except RecordCorrupt as error:
                # Without its reference the cell is written again once it has been recomputed.
                forget = LogBatch()
                forget.delete_cell_ref(tenant, hashes[cell])
                self.store.log.write(forget).result()
                return total, cell, error.message
        return total, len(hashes), ""

    def _read_tails(
        self,
        tenant: str,
        chain: Sequence[RevisionRecord],
        cache: SessionCache,
        sealed: int,
        n_ids: int,
        report: Restoration,
    ) -> tuple[int, int]:
        """Read the branch's tails beyond `sealed`; returns where they end, and what of it is borrowed."""
        tails, why = joined_tails(self.store, tenant, chain, sealed, n_ids)
        report.corrupt = why or report.corrupt
        stop = borrowed = 0
        for ref in tails:
            owner = KVOwner(tenant, "tail", ref.revision_id.encode(), ref.generation)
            span = Span(ref.start, ref.start + ref.length)
            if span.end <= cache.length:
                continue
            try:
                report.bytes_read += self._read_behind(owner, span, cache)
            except RecordCorrupt as error:
                report.corrupt = error.message
                stop = min(stop, span.start)  # what stood there was written over
                break
            stop = span.end
            if span.start <= max(sealed, borrowed):
                borrowed = max(borrowed, int(ref.extra.get("borrowed", 0)))
        return stop, borrowed

    def _read_behind(self, owner: KVOwner, span: Span, cache: SessionCache) -> int:
        """Read a run, of which only what lies behind the positions that the cache holds; returns the bytes read.

        What is held may be sealed, copied by others just now, or better than what is read.
        """
        read, held = self.store.blocks.read_into, cache.length
        if span.start >= held:
            return read(owner, span.start, len(span), self.shape.n_layers, into(cache, span))
        aside = np.empty((self.shape.n_layers, 2, *cache.array(0, 0, span).shape), cache.array(0, 0, span).dtype)
        n_bytes = read(owner, span.start, len(span), self.shape.n_layers, lambda layer, part: aside[layer, int(part)])
        for layer in range(self.shape.n_layers):
            for part in (Part.K, Part.V):
                cache.array(layer, part, Span(held, span.end))[...] = aside[layer, int(part)][:, held - span.start :]
        return n_bytes

    def _read_relatives(
        self,
        tenant: str,
        chain: Sequence[RevisionRecord],
        ids: Ids,
        cache: SessionCache,
        report: Restoration,
        *,
        share: bool,
    ) -> None:
        """Extend the cache by what branches that go on behind this one's head hold of the same tokens."""
        for leaf in leaves_behind(self.store.log, chain[-1])[:MOST_RELATIVES]:
            if cache.length >= len(ids):
                return
            try:
                branch, theirs = read_branch(self.store.log, tenant, leaf)
            except (RevisionNotFound, RecordCorrupt):
                continue  # purged, or damaged: it was only a chance
            found = self._relative_cell(tenant, theirs, cache) if share else None
            owner, span = found or self._relative_tail(tenant, branch, cache) or (None, Span(0, 0))
            if owner is None:
                continue
            cache.about_to_change(span.start)
            cache.wrote(span.end)
            try:
                report.bytes_read += self.store.blocks.read_into(
                    owner, span.start, len(span), self.shape.n_layers, into(cache, span)
                )
            except RecordCorrupt:
                cache.length = min(cache.length, span.start)  # what stood there was written over
                cache.sealed = min(cache.sealed, cache.length // self.cell_tokens * self.cell_tokens)
                continue
            cache.length = max(cache.length, min(span.end, len(ids)))

    def _relative_cell(self, tenant: str, theirs: Ids, cache: SessionCache) -> tuple[KVOwner, Span] | None:
        """Their sealed cell that holds the first position this cache lacks."""
        span = Span(*(cache.length // self.cell_tokens * self.cell_tokens + n for n in (0, self.cell_tokens)))
        hashes = prefix_hashes(tenant, self.identity_id, theirs[: span.end], self.cell_tokens)
        if len(hashes) * self.cell_tokens < span.end or cell_refs(self.store, tenant, hashes[-1:])[0][0] is None:
            return None
        return KVOwner(tenant, "cell", hashes[-1]), span

    def _relative_tail(
        self, tenant: str, branch: Sequence[RevisionRecord], cache: SessionCache
    ) -> tuple[KVOwner, Span] | None:
        """Their newest tail, if it goes on from what this cache holds without touching sealed cells."""
        for revision in reversed(branch):
            ref, _ = tail_ref(self.store, tenant, revision.revision_id)
            if ref is not None:
                span = Span(ref.start, ref.start + ref.length)
                if cache.sealed <= span.start <= cache.length < span.end:
                    return KVOwner(tenant, "tail", revision.revision_id.encode(), ref.generation), span
                return None
        return None


def into(cache: SessionCache, span: Span) -> Callable[[int, Part], np.ndarray[Any, Any]]:
    """Where a block of this span goes: the destination that `BlockStore.read_into` asks for."""

    def out(layer: int, part: Part) -> np.ndarray[Any, Any]:
        return cache.array(layer, int(part), span)

    return out


def leading(refs: Sequence[CellRef | None]) -> int:
    """How many references come before the first gap."""
    return next((i for i, ref in enumerate(refs) if ref is None), len(refs))
