"""BlockStore: KV records on disk. An accelerator that is verified; the token log is the promise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessiond.storage import keys
from sessiond.storage.batch import delete_range
from sessiond.storage.envelope import corrupt
from sessiond.storage.environment import MAX_TXN_BYTES, Environment, EnvironmentStat, Op, WriteTxn
from sessiond.storage.kv import KVOwner, KVRecord, open_record
from sessiond.storage.scan import kv_owners
from sessiond.types import Part

Destination = Callable[[int, Part], NDArray[Any]]

_PARTS = (Part.K, Part.V)


class BlockStore:
    """Thread-safe. Reads decode straight from the map, one record (at most about 1 MiB) a transaction."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._local = threading.local()

    @property
    def environment(self) -> Environment:
        """What it is stored in, for the care of the store."""
        return self._env

    def write(self, records: Iterable[tuple[bytes, bytes]]) -> Future[None]:
        """Store records (from encode_kv); the future resolves when all are durable.

        Transactions hold at most 8 MiB, so a failure may leave some of the records: garbage, not damage,
        as no reference names them yet. Blocks while the writer's queue is full.
        """
        groups: list[tuple[list[Op], int]] = []
        for key, value in records:
            if not groups or groups[-1][1] + len(value) > MAX_TXN_BYTES:
                groups.append(([], 0))
            ops, size = groups[-1]
            ops.append(_put(key, value))
            groups[-1] = (ops, size + len(value))
        return _all_of([self._env.submit(ops, size) for ops, size in groups])

    def read_into(self, owner: KVOwner, start: int, n_tokens: int, n_layers: int, out: Destination) -> int:
        """Fill out(layer, part) [G, n_tokens, D] for layers [0, n_layers), K and V, positions from `start`.

        Destinations are unsigned arrays of any strides; only they are written. Returns the bytes read.
        Raises RecordCorrupt naming the first record that is missing, damaged or of another shape;
        destinations may then hold anything and must not be used.
        """
        total = 0
        prefix = owner.prefix
        for part in _PARTS:
            layer = 0
            while layer < n_layers:
                count, n_bytes = self._read_group(prefix, start, n_tokens, part, layer, n_layers, out)
                layer += count
                total += n_bytes
        return total

    def shape(self, owner: KVOwner, start: int) -> tuple[int, int, int, int]:
        """Layers, KV heads, head size and element size of the records at `start`, whatever model made them.

        Raises RecordCorrupt, also where there are none.
        """
        prefix = keys.kv_part_prefix(owner.prefix, start, Part.K)
        found: tuple[int, int, int, int] | None = None
        with self._env.read() as txn, txn.cursor() as cursor:
            ahead = cursor.set_range(prefix)
            while ahead and bytes(cursor.key()).startswith(prefix):
                record = open_record(bytes(cursor.key()), cursor.value())
                heads, _, size = record.shape
                found = (record.first_layer + record.n_layers, heads, size, record.itemsize)
                ahead = cursor.next()
        if found is None:
            raise corrupt(prefix, "missing")
        return found

    def delete(self, owner: KVOwner) -> Future[None]:
        """Remove all records of `owner`; absent is fine. Delete the reference in the log first."""
        prefix = owner.prefix
        return self._env.submit([lambda txn: delete_range(txn, prefix)], 0, frees=True)

    def delete_tails(self, tenant: str, revision_id: str) -> Future[None]:
        """Remove a revision's tails of every generation; absent is fine. Delete the reference in the log first."""
        prefix = KVOwner(tenant, "tail", revision_id.encode()).every_generation
        return self._env.submit([lambda txn: delete_range(txn, prefix)], 0, frees=True)

    def holds(self, owner: KVOwner) -> bool:
        """Whether there is any record of `owner`."""
        prefix = owner.prefix
        with self._env.read() as txn, txn.cursor() as cursor:
            return bool(cursor.set_range(prefix) and bytes(cursor.key()).startswith(prefix))

    def owners(self, tenant: str | None = None) -> Iterator[KVOwner]:
        """Every owner that has a record, in key order; each step is its own short transaction."""
        return kv_owners(self._env, b"" if tenant is None else keys.tenant_prefix(tenant))

    def stat(self) -> EnvironmentStat:
        return self._env.stat()

    def close(self) -> None:
        """Flush and close. Idempotent."""
        self._env.close()

    def _read_group(
        self,
        prefix: bytes,
        start: int,
        n_tokens: int,
        part: Part,
        layer: int,
        n_layers: int,
        out: Destination,
    ) -> tuple[int, int]:
        """One layer group over all its token runs -> (layers, bytes)."""
        views: list[NDArray[Any]] = []
        at, total, count = start, 0, 0
        while at < start + n_tokens:
            key = keys.kv_key(prefix, at, part, layer)
            with self._env.read() as txn:
                value = txn.get(key)
                if value is None:
                    raise corrupt(key, "missing")
                record = open_record(key, value)
                if not views:
                    count = record.n_layers
                    if layer + count > n_layers:
                        raise corrupt(key, f"holds layers up to {layer + count} of {n_layers}")
                    views = [out(layer + i, part) for i in range(count)]
                _check(record, at, part, layer, count, start + n_tokens - at)
                n = record.shape[1]
                for i, view in enumerate(views):
                    self._decode(record, layer + i, view[:, at - start : at - start + n])
                total += len(value)
            at += n
        return count, total

    def _decode(self, record: KVRecord, layer: int, out: NDArray[Any]) -> None:
        if out.shape != record.shape or out.itemsize != record.itemsize:
            raise corrupt(record.key, f"shape {record.shape} x {record.itemsize}, expected {out.shape}")
        scratch: NDArray[np.uint8] | None = getattr(self._local, "scratch", None)
        if scratch is None or len(scratch) < out.nbytes:
            scratch = self._local.scratch = np.empty(max(out.nbytes, 1 << 16), np.uint8)
        record.decode(layer, out, scratch)


def _put(key: bytes, value: bytes) -> Op:
    def op(txn: WriteTxn) -> None:
        txn.put(key, value)

    return op


def _check(record: KVRecord, start: int, part: Part, layer: int, count: int, n_left: int) -> None:
    """The header must say what the key says, and fit what is asked for."""
    said = (record.start, record.part, record.first_layer, record.n_layers)
    if said != (start, part, layer, count) or not 1 <= record.shape[1] <= n_left:
        raise corrupt(record.key, "header does not fit the request")


def _all_of(parts: list[Future[None]]) -> Future[None]:
    """A future that resolves when all do, with the first error."""
    if len(parts) == 1:
        return parts[0]
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()
    left, lock, failure = len(parts), threading.Lock(), None

    def one(part: Future[None]) -> None:
        nonlocal left, failure
        with lock:
            left -= 1
            failure = failure or part.exception()
            last = left == 0
        if last:
            if failure is not None:
                done.set_exception(failure)
            else:
                done.set_result(None)

    for part in parts:
        part.add_done_callback(one)
    if not parts:
        done.set_result(None)
    return done
