"""References to KV that cannot be read count as absent: the KV is computed from its tokens again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sessiond.errors import RecordCorrupt
from sessiond.storage.batch import LogBatch
from sessiond.storage.kv import KVOwner
from sessiond.storage.records import CellRef, RevisionRecord, TailRef
from sessiond.storage.store import Store


def cell_refs(
    store: Store, tenant: str, hashes: Sequence[bytes], *, forget: bool = True
) -> tuple[list[CellRef | None], dict[bytes, str]]:
    """The references of these cells, in order, None where absent or damaged; and what is wrong with damaged ones.

    Damaged ones are deleted (not without `forget`), so that the cell is written again once it has been computed.
    """
    try:
        return store.log.cell_refs(tenant, hashes), {}
    except RecordCorrupt:
        pass
    refs: list[CellRef | None] = []
    damaged: dict[bytes, str] = {}
    for prefix_hash in hashes:
        try:
            refs.append(store.log.cell_ref(tenant, prefix_hash))
        except RecordCorrupt as error:
            damaged[prefix_hash] = error.message
            refs.append(None)
    if forget:
        batch = LogBatch()
        for prefix_hash in damaged:
            batch.delete_cell_ref(tenant, prefix_hash)
        store.log.write(batch).result()
    return refs, damaged


def tail_ref(store: Store, tenant: str, revision_id: str, *, forget: bool = True) -> tuple[TailRef | None, str]:
    """A revision's tail, None if absent or damaged; what is wrong with a damaged one.

    A damaged one is deleted (not without `forget`), and whatever it may have named.
    """
    try:
        return store.log.tail_ref(tenant, revision_id), ""
    except RecordCorrupt as error:
        if forget:
            damaged = LogBatch()
            damaged.delete_tail_ref(tenant, revision_id)
            store.log.write(damaged).result()
            store.blocks.delete_tails(tenant, revision_id).result()
        return None, error.message


def joined_tails(
    store: Store, tenant: str, chain: Sequence[RevisionRecord], sealed: int, n_ids: int, *, forget: bool = True
) -> tuple[list[TailRef], str]:
    """The branch's tails that lead from `sealed` on without a gap, lowest first; and what is wrong with a damaged one.

    Mostly one. An imported tree has one for each segment between forks: they join, or reach into each other.
    """
    tails: list[TailRef] = []
    corrupt = ""
    for revision in reversed(chain):
        if revision.position_end <= sealed:
            break
        ref, why = tail_ref(store, tenant, revision.revision_id, forget=forget)
        corrupt = why or corrupt
        if ref is None:
            continue
        stop = ref.start + ref.length
        if stop <= sealed or stop > n_ids:
            break
        if tails and stop < tails[-1].start:  # what lies behind the gap is of no use
            tails.clear()
        tails.append(ref)
        if ref.start <= sealed:
            return tails[::-1], corrupt
    return [], corrupt


def reference_of(store: Store, owner: KVOwner) -> CellRef | TailRef | None:
    """The reference that names this owner's KV; None if there is none, or a damaged one."""
    try:
        if owner.kind == "cell":
            return store.log.cell_ref(owner.tenant, owner.id)
        tail = store.log.tail_ref(owner.tenant, owner.id.decode())
    except RecordCorrupt:
        return None
    return tail if tail and tail.generation == owner.generation else None


def is_referenced(store: Store, owner: KVOwner) -> bool:
    """Whether the log refers to this owner's KV. A damaged reference counts: it may name it."""
    try:
        if owner.kind == "cell":
            return store.log.cell_ref(owner.tenant, owner.id) is not None
        tail = store.log.tail_ref(owner.tenant, owner.id.decode())
        return tail is not None and tail.generation == owner.generation
    except RecordCorrupt:
        return True


def delete_unreferenced(store: Store, owners: Iterable[KVOwner]) -> list[KVOwner]:
    """Delete the KV of those owners that nobody refers to or is writing just now; returns them when it is gone.

    Looking and queueing are one step for whoever writes KV (`Store.inflight`), and blocks are written in the order
    they are queued: KV that is written again afterwards stays.
    """
    deleted: list[KVOwner] = []
    futures = []
    for owner in owners:

        def act(_: list[bytes], owner: KVOwner = owner) -> None:
            if not is_referenced(store, owner):
                futures.append(store.blocks.delete(owner))
                deleted.append(owner)

        store.inflight.unless_used([owner.name], set(), act)
    for future in futures:
        future.result()
    return deleted
