"""A store full of known records, and reading all of it: exactly right, refused by a typed error, or silently wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from oracle import Oracle
from script import DIM, N_GROUPS, N_LAYERS, TENANT, Script
from workload import CODEC, Workload

from sessiond import errors
from sessiond.storage import keys
from sessiond.storage.batch import LogBatch
from sessiond.storage.blocks import BlockStore
from sessiond.storage.environment import Environment
from sessiond.storage.kv import KVOwner, encode_kv
from sessiond.storage.log import LogStore
from sessiond.storage.records import CellRef
from sessiond.storage.store import Store
from sessiond.types import Part

OPTIONS = {"log_map_bytes": 64 << 20, "block_map_bytes": 64 << 20}
SESSIONS = 4
LARGE_CELLS = 16


def make_store(root: Path, seed: int) -> Path:
    """A store with some sessions; beside it, as `old-log` and `old-blocks`, the files as they were some turns ago."""
    with Store.open(root / "data", **OPTIONS) as store:
        batch = LogBatch()
        batch.put_identity("identity", {"weights": "w"})
        batch.put_profile("profile", {"threads": 1})
        store.log.write(batch).result()
        work = Workload(store, Oracle(root / "oracle"), seed)
        work.run(SESSIONS - 1)
        _put_large_cells(store, seed, range(LARGE_CELLS // 2))
        work.play(SESSIONS - 1, turns=2)
    for name in ("log", "blocks"):
        (root / f"old-{name}").write_bytes((root / "data" / name / "data.mdb").read_bytes())
    with Store.open(root / "data", **OPTIONS) as store:
        _put_large_cells(store, seed, range(LARGE_CELLS // 2, LARGE_CELLS))
        Workload(store, Oracle(root / "oracle"), seed).run(1)
        _touch_sessions(store)
    return root / "data"


def _touch_sessions(store: Store) -> None:
    """Write every session again, otherwise and as long: an old page may then come back whole and valid."""
    batch = LogBatch()
    for record in store.log.sessions(TENANT):
        batch.put_session(replace(record, labels={key: "x" * len(value) for key, value in record.labels.items()}))
    store.log.write(batch).result()


def _put_large_cells(store: Store, seed: int, numbers: range) -> None:
    """Cells whose records take pages of their own, of unequal counts, as the daemon's do."""
    for i in numbers:
        put_cell(store, seed, 2_000 + i, 64 + 48 * (i % 5))


def put_cell(stores: Store | Stores, seed: int, number: int, n_tokens: int) -> None:
    """A sealed cell of its own, with its KV."""
    name = b"cell %011d" % number
    arrays = Script(seed).kv(number, 0, n_tokens)
    coded = encode_kv(KVOwner(TENANT, "cell", name), 0, arrays, codec=CODEC)
    stores.blocks.write(coded.records).result()
    batch = LogBatch()
    batch.put_cell_ref(
        CellRef(
            TENANT, name, 0, 0, n_tokens, len(coded.records), coded.raw_bytes, coded.coded_bytes, coded.kv_digest,
            "profile",
        )
    )  # fmt: skip
    stores.log.write(batch).result()


def raw_records(env: Environment) -> dict[bytes, bytes]:
    with env.read() as txn:
        return {bytes(key): bytes(value) for key, value in txn.cursor()}


@dataclass
class Stores:
    """Log and blocks of a data directory, without its catalog."""

    log: LogStore
    blocks: BlockStore

    def close(self) -> None:
        self.log.close()
        self.blocks.close()


def open_stores(data: Path) -> Stores:
    log = LogStore(Environment(str(data / "log"), map_bytes=OPTIONS["log_map_bytes"], tallied="yes"))
    try:
        return Stores(log, BlockStore(Environment(str(data / "blocks"), map_bytes=OPTIONS["block_map_bytes"])))
    except BaseException:
        log.close()
        raise


@dataclass(frozen=True)
class Names:
    """What there is to read, as another place (the catalog, a client) would name it."""

    sessions: list[str]
    revisions: list[str]
    requests: list[tuple[str, str]]
    cells: list[bytes]


def names_of(stores: Stores) -> Names:
    sessions = stores.log.ids(TENANT, keys.SESSION)
    revisions = [r for s in sessions for r in stores.log.ids(TENANT, keys.REVISION_INDEX, s)]
    requests = [(s, q) for s in sessions for q in stores.log.ids(TENANT, keys.REQUEST, s)]
    return Names(sessions, revisions, requests, [ref.prefix_hash for ref in stores.log.all_cell_refs(TENANT)])


def all_reads(stores: Stores, names: Names) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every read of the log and of the KV, by a name that says what is read."""
    log = stores.log
    for s in names.sessions:
        yield f"session {s}", lambda s=s: log.session(TENANT, s)
        yield f"revisions {s}", lambda s=s: log.revisions_of_session(TENANT, s)
        yield f"chain {s}", lambda s=s: log.chain(TENANT, log.session(TENANT, s).head_revision)
        yield f"requests {s}", lambda s=s: log.requests(TENANT, s)
    for s, q in names.requests:
        yield f"request {q}", lambda s=s, q=q: log.request(TENANT, s, q)
    for r in names.revisions:
        yield f"revision {r}", lambda r=r: log.revision(TENANT, r)
        yield f"messages {r}", lambda r=r: log.messages(TENANT, r)
        yield f"tokens {r}", lambda r=r: [part.tolist() for part in log.tokens(TENANT, r)]
        yield f"tail {r}", lambda r=r: _tail(stores, r)
    for c in names.cells:
        yield f"cell {c.hex()}", lambda c=c: _cell(stores, c)
    yield "sessions", lambda: log.sessions()
    yield "identity", lambda: log.identity("identity")
    yield "profile", lambda: log.profile("profile")


def _cell(stores: Stores, name: bytes) -> Any:
    ref = stores.log.cell_ref(TENANT, name)
    return None if ref is None else (ref, _kv(stores, KVOwner(TENANT, "cell", name), ref.start, ref.n_tokens))


def _tail(stores: Stores, revision: str) -> Any:
    ref = stores.log.tail_ref(TENANT, revision)
    if ref is None:
        return None
    return ref, _kv(stores, KVOwner(TENANT, "tail", revision.encode(), ref.generation), ref.start, ref.length)


def _kv(stores: Stores, owner: KVOwner, start: int, n: int) -> list[bytes]:
    places = [(layer, part) for layer in range(N_LAYERS) for part in (Part.K, Part.V)]
    out = {place: np.zeros((N_GROUPS, n, DIM), np.uint16) for place in places}
    stores.blocks.read_into(owner, start, n, N_LAYERS, lambda layer, part: out[layer, part])
    return [array.tobytes() for array in out.values()]


def read_all(stores: Stores, names: Names) -> dict[str, Any]:
    return {what: read() for what, read in all_reads(stores, names)}


def compare(stores: Stores, names: Names, truth: dict[str, Any]) -> tuple[int, list[str]]:
    """(reads refused by a typed error, what was read and is wrong). Only what `truth` knows is read."""
    refused, wrong = 0, []
    for what, read in all_reads(stores, names):
        if what not in truth:
            continue
        try:
            found = read()
        except errors.SessiondError:
            refused += 1
        else:
            if found != truth[what]:
                wrong.append(what)
    return refused, wrong
