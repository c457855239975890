"""A small store with every kind of record, made without a model: for tests of its care."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sessiond.storage import tally
from sessiond.storage.batch import LogBatch
from sessiond.storage.catalog import SessionRow
from sessiond.storage.codec import codec_for
from sessiond.storage.kv import KVOwner, encode_kv
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import CellRef, RequestRecord, RevisionRecord, SessionRecord, TailRef
from sessiond.storage.store import Store

CELL = 128
TENANT = "t"
IDENTITY = "id1"
PROFILE = "p1"
N_PROMPT = 300  # tokens of the root; the turn adds 20: two cells and a tail


@contextlib.contextmanager
def open_store(path: Path) -> Iterator[Store]:
    store = Store.open(path, cell_tokens=CELL, log_map_bytes=64 << 20, block_map_bytes=256 << 20, reserve_bytes=0)
    with store:
        yield store


def arrays(start: int, n: int, seed: int):
    rng = np.random.default_rng([seed, start])
    return [tuple(rng.integers(0, 1 << 16, (2, n, 8)).astype(np.uint16) for _ in range(2)) for _ in range(3)]


def tokens(seed: int, n: int):
    return np.random.default_rng(seed).integers(0, 1000, n).astype(np.uint32)


def put_cell(store: Store, prefix_hash: bytes, index: int, *, refer: bool = True, profile: str = PROFILE) -> KVOwner:
    owner = KVOwner(TENANT, "cell", prefix_hash)
    coded = encode_kv(owner, index * CELL, arrays(index * CELL, CELL, 1), codec=codec_for("bfloat16"))
    store.blocks.write(coded.records).result()
    if refer:
        batch = LogBatch()
        batch.put_cell_ref(
            CellRef(
                tenant=TENANT, prefix_hash=prefix_hash, index=index, start=index * CELL, n_tokens=CELL,
                n_records=len(coded.records), raw_bytes=coded.raw_bytes, coded_bytes=coded.coded_bytes,
                kv_digest=coded.kv_digest, profile_id=profile,
            )
        )  # fmt: skip
        store.log.write(batch).result()
    return owner


def put_tail(store: Store, revision_id: str, start: int, n: int, generation: int = 1, *, refer: bool = True) -> KVOwner:
    owner = KVOwner(TENANT, "tail", revision_id.encode(), generation)
    coded = encode_kv(owner, start, arrays(start, n, 2), codec=codec_for("bfloat16"))
    store.blocks.write(coded.records).result()
    if refer:
        batch = LogBatch()
        batch.put_tail_ref(
            TailRef(
                tenant=TENANT, revision_id=revision_id, start=start, length=n, raw_bytes=coded.raw_bytes,
                coded_bytes=coded.coded_bytes, kv_digest=coded.kv_digest, profile_id=PROFILE, generation=generation,
            )
        )  # fmt: skip
        store.log.write(batch).result()
    return owner


def revision(session_id: str, revision_id: str, parent: str | None, start: int, n: int) -> RevisionRecord:
    return RevisionRecord(
        tenant=TENANT, revision_id=revision_id, session_id=session_id, parent=parent,
        kind="turn" if parent else "root", log_start=start, log_end=start + n, position_start=start,
        position_end=start + n, n_prompt=n, n_generated=0, finish_reason=None, aborted=False, created_us=10 + start,
        request_id="q", usage={},
    )  # fmt: skip


def put_revision(batch: LogBatch, record: RevisionRecord, seed: int) -> None:
    n = record.log_end - record.log_start
    batch.append_tokens(TENANT, record.revision_id, 0, tokens(seed, n))
    batch.put_revision(record, b"{}")


def request(session_id: str, request_id: str, base: str, revision_id: str, state: str) -> RequestRecord:
    finished = {"revision": revision_id} if state == "finished" else None
    return RequestRecord(
        tenant=TENANT, session_id=session_id, request_id=request_id, digest="d", state=state, base_revision=base,
        revision_id=revision_id, params={}, created_us=1, updated_us=1, finished=finished,
    )  # fmt: skip


def put_session(store: Store, session_id: str = "s1", *, seed: int = 1, root_seed: int = 0, kv: bool = True) -> None:
    """A session with a root, a turn, its request, a suspended turn, two sealed cells and a tail."""
    root, head, unborn = (f"{session_id}-{name}" for name in ("root", "head", "unborn"))
    batch = LogBatch()
    put_revision(batch, revision(session_id, root, None, 0, N_PROMPT), root_seed)
    put_revision(batch, revision(session_id, head, root, N_PROMPT, 20), seed)
    batch.put_request(request(session_id, "turn-1", root, head, "finished"))
    batch.put_request(request(session_id, "turn-2", head, unborn, "suspended"))
    batch.append_tokens(TENANT, unborn, 0, tokens(9, 5))
    record = SessionRecord(
        tenant=TENANT, session_id=session_id, head_revision=head, root_revision=root, model="m", adapter="",
        identity_id=IDENTITY, policy={}, labels={"a": "b"}, created_us=1, updated_us=1, last_used_us=1, ttl_us=None,
        expire_us=None, deleted_us=None, purge_us=None, generation=1, create_request_id="",
        extra={"open_request": "turn-2"},
    )  # fmt: skip
    batch.put_session(record)
    batch.put_prior(TENANT, head, {"identity_id": IDENTITY, "start": 0}, bytes(40))
    batch.put_identity(IDENTITY, {"name": "m"})
    batch.put_profile(PROFILE, {"name": "p"})
    store.log.write(batch).result()
    store.catalog.correct([SessionRow.of(record)])
    if kv:
        for index, prefix_hash in enumerate(cells(root_seed)):
            put_cell(store, prefix_hash, index)
        put_tail(store, head, 2 * CELL, N_PROMPT + 20 - 2 * CELL)


def cells(root_seed: int = 0) -> list[bytes]:
    return prefix_hashes(TENANT, IDENTITY, tokens(root_seed, N_PROMPT), CELL)


def contents(store: Store) -> dict[bytes, bytes]:
    """Every record of log and blocks; the tally, which changes with every write, left out."""
    found = {}
    for env in (store.log.environment, store.blocks.environment):
        with env.read() as txn:
            found |= {bytes(key): bytes(value) for key, value in txn.cursor()}
    found.pop(tally.KEY)
    return found


def change(store: Store, key: bytes, value: bytes | None) -> None:
    """Overwrite or delete a record behind the store's back."""
    for env in (store.log.environment, store.blocks.environment):
        with env.read() as txn:
            known = txn.get(key) is not None
        if known:
            env.submit([lambda txn: txn.delete(key) if value is None else txn.put(key, value)], 0, frees=True).result()


def flip(store: Store, key: bytes, at: int = -1) -> None:
    """Flip a bit of a record, of its last byte unless said otherwise."""
    value = bytearray(contents(store)[key])
    value[at] ^= 1
    change(store, key, bytes(value))
