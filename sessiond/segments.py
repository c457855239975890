"""Which KV on disk belongs to which part of a tree, as runs of at most 128 positions.

root ──────── fork ──────── head          a segment ends at the head, at a fork, at a leaf
                └────────── leaf          its runs start where its parent's stop, or in the cell that lies across
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from sessiond.branch import Ids
from sessiond.history import History
from sessiond.references import cell_refs, tail_ref
from sessiond.storage.kv import SPAN_TOKENS, KVOwner
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import RevisionRecord, SessionRecord, TailRef
from sessiond.storage.store import Store


@dataclass(frozen=True, slots=True)
class Run:
    """Positions [start, end) of one record run of `owner`, which begins at `record_start` with `n_record` of them.

    `revision`: index of the segment's last revision; `after`: of its parent segment's, or -1.
    """

    revision: int
    after: int
    owner: KVOwner
    record_start: int
    n_record: int
    start: int
    sealed: bool
    profile: int
    raw_bytes: int

    @property
    def end(self) -> int:
        return self.record_start + self.n_record


@dataclass(frozen=True, slots=True)
class Segment:
    """`revisions`: its own, by index, the last one `end`. `after`: the last of the segment before it, or -1.

    `hashes`: of all whole cells of the branch that ends with it.
    """

    end: int
    after: int
    revisions: list[int]
    hashes: list[bytes]


def walk(tenant: str, identity_id: str, history: History, cell: int) -> Iterator[Segment]:
    """The segments, parents first. Each token is hashed once: a branch goes on from its parent's hashes."""
    none: tuple[list[bytes], Ids] = [], np.zeros(0, np.uint32)
    reached = {-1: none}  # hashes so far, and the tokens behind the last whole cell
    for own in history.segments():
        parent = history.revisions[own[0]].parent
        after = -1 if parent is None else parent
        before, rest = reached[after]
        ids = np.concatenate([rest, *(history.revisions[at].ids for at in own)])
        more = prefix_hashes(tenant, identity_id, ids, cell, parent=before[-1] if before else None)
        reached[own[-1]] = [*before, *more], ids[len(more) * cell :].copy()
        yield Segment(own[-1], after, own, reached[own[-1]][0])


def plan_runs(
    store: Store, session: SessionRecord, history: History, records: list[RevisionRecord], profiles: list[str]
) -> list[Run]:
    """The runs on disk, segment by segment, each without gaps. Profile ids met are added to `profiles`."""
    covered = {-1: 0}
    tails: dict[int, list[TailRef]] = {-1: []}
    runs: list[Run] = []
    for segment in walk(session.tenant, session.identity_id, history, store.cell_tokens):
        index, after = segment.end, segment.after
        start = covered[after] // store.cell_tokens * store.cell_tokens
        found = (tail_ref(store, session.tenant, records[i].revision_id, forget=False)[0] for i in segment.revisions)
        tails[index] = [*tails[after], *(ref for ref in found if ref)]
        own = list(_segment(store, session.tenant, segment, tails[index], profiles, start, history.ends[index]))
        covered[index] = own[-1].end if own else covered[after]
        runs += own
    return runs


def _segment(
    store: Store, tenant: str, segment: Segment, tails: list[TailRef], profiles: list[str], start: int, end: int
) -> Iterator[Run]:
    index, after, cell = segment.end, segment.after, store.cell_tokens
    refs, _ = cell_refs(store, tenant, segment.hashes[start // cell :], forget=False)
    at = start
    for cell_ref in refs:
        if cell_ref is None:
            break
        owner = KVOwner(tenant, "cell", cell_ref.prefix_hash)
        yield from _cut(
            index, after, owner, (at, cell), at, True, _number(profiles, cell_ref.profile_id), cell_ref.raw_bytes
        )
        at += cell
    while at < end:  # mostly one; an imported tree has one a segment
        joined = [ref for ref in tails if ref.start <= at < ref.start + ref.length <= end]
        if not joined:
            return
        ref = max(joined, key=lambda ref: ref.start + ref.length)
        owner = KVOwner(tenant, "tail", ref.revision_id.encode(), ref.generation)
        sealed_upto = int(ref.extra.get("borrowed", 0))
        for run in _cut(
            index, after, owner, (ref.start, ref.length), at, False, _number(profiles, ref.profile_id), ref.raw_bytes
        ):
            yield replace(run, sealed=run.end <= sealed_upto)
        at = ref.start + ref.length


def _cut(
    index: int, after: int, owner: KVOwner, span: tuple[int, int], at: int, sealed: bool, profile: int, raw: int
) -> Iterator[Run]:
    """The record runs of `span` (start, length), from position `at` on."""
    first, length = span
    for start in range(first, first + length, SPAN_TOKENS):
        n = min(SPAN_TOKENS, first + length - start)
        if start + n > at:
            kept = max(start, at)
            n_bytes = raw * (start + n - kept) // length
            yield Run(index, after, owner, start, n, kept, sealed, profile, n_bytes)


def _number(profiles: list[str], profile_id: str) -> int:
    if profile_id not in profiles:
        profiles.append(profile_id)
    return profiles.index(profile_id)
