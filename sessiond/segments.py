"""Which KV on disk belongs to which part of a tree, as runs of at most 128 positions.

root ──────── fork ──────── head          a segment ends at the head, at a fork, at a leaf
                └────────── leaf          its runs start where its parent's stop, or in the cell that lies across
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sessiond.history import History
from sessiond.references import cell_refs, tail_ref
from sessiond.storage.kv import SPAN_TOKENS, KVOwner
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import RevisionRecord, SessionRecord
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


def segment_ends(history: History) -> list[int]:
    """Indices of the revisions at which a segment ends, parents first."""
    children = [0] * len(history.revisions)
    for told in history.revisions:
        if told.parent is not None:
            children[told.parent] += 1
    return [i for i, n in enumerate(children) if n != 1 or i == history.head]


def parent_segment(history: History, ends: set[int], index: int) -> int:
    """The segment before the one that ends at `index`: its last revision, or -1."""
    at = history.revisions[index].parent
    while at is not None and at not in ends:
        at = history.revisions[at].parent
    return -1 if at is None else at


def plan_runs(
    store: Store, session: SessionRecord, history: History, records: list[RevisionRecord], profiles: list[str]
) -> list[Run]:
    """The runs on disk, segment by segment, each without gaps. Profile ids met are added to `profiles`."""
    ends = segment_ends(history)
    covered = {-1: 0}
    runs: list[Run] = []
    for index in ends:
        after = parent_segment(history, set(ends), index)
        start = covered[after] // store.cell_tokens * store.cell_tokens
        own = list(_segment(store, session, history, records, profiles, index, after, start))
        covered[index] = own[-1].end if own else covered[after]
        runs += own
    return runs


def _segment(
    store: Store,
    session: SessionRecord,
    history: History,
    records: list[RevisionRecord],
    profiles: list[str],
    index: int,
    after: int,
    start: int,
) -> Iterator[Run]:
    tenant, cell, end = session.tenant, store.cell_tokens, history.ends[index]
    hashes = prefix_hashes(tenant, session.identity_id, history.ids(index), cell)
    refs, _ = cell_refs(store, tenant, hashes[start // cell :], forget=False)
    at = start
    for cell_ref in refs:
        if cell_ref is None:
            break
        owner = KVOwner(tenant, "cell", cell_ref.prefix_hash)
        yield from _cut(
            index, after, owner, (at, cell), at, True, _number(profiles, cell_ref.profile_id), cell_ref.raw_bytes
        )
        at += cell
    tails = [tail_ref(store, tenant, records[i].revision_id, forget=False)[0] for i in history.chain(index)]
    while at < end:  # mostly one; an imported tree has one a segment
        joined = [ref for ref in tails if ref and ref.start <= at < ref.start + ref.length <= end]
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
