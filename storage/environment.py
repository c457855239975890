"""One LMDB environment: short reads from any thread, writes through one writer thread with group commit.

The group is what arrived while the previous transaction was being made durable; no timer waits for more.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, cast

import lmdb

from sessiond import errors
from sessiond.storage import space
from sessiond.storage.compaction import compact_file
from sessiond.storage.failures import from_lmdb, may_be_out_of_space
from sessiond.storage.mapfile import HalfDoneError, MapFile
from sessiond.storage.mapfile import ReadTxn as ReadTxn
from sessiond.storage.mapfile import WriteTxn as WriteTxn
from sessiond.storage.tally import TalliedTxn, Tally, build_tally, read_tally

QUEUED_WRITES = 1024
MAX_TXN_BYTES = 8 << 20
DEFAULT_RESERVE_BYTES = 64 << 20
_SPARE_BYTES = 1 << 20

_RETRY_SECONDS = 10.0

Tallied = Literal["no", "yes", "new", "accept"]
Op = Callable[[WriteTxn], None]


@dataclass(frozen=True, slots=True)
class EnvironmentStat:
    """Sizes in bytes. `file_bytes` never shrinks; `used_bytes` counts pages that are not free."""

    entries: int
    used_bytes: int
    overflow_bytes: int  # pages of values too large for a tree page: the KV records
    file_bytes: int
    map_bytes: int
    commits: int
    batches: int


@dataclass(slots=True)
class _Batch:
    ops: Sequence[Op]
    n_bytes: int
    frees: bool
    done: Future[None]


@dataclass(slots=True)
class _Task:
    """Something the writer does to the file as a whole, between two transactions."""

    run: Callable[[], None]
    done: Future[None]


class Environment:
    """An open environment in the folder `path`.

    Thread-safe. Must not be used across fork(). A commit that failed for want of space is refused (DiskFull) and so is
    what follows, until there is space again. After any other failed commit or fsync no more writes are taken
    (StoreReadOnly) until reopened. Reads go on in both cases. docs/decisions/0011-full-or-read-only.md.
    """

    def __init__(
        self,
        path: str,
        *,
        map_bytes: int,
        reserve_bytes: int = DEFAULT_RESERVE_BYTES,
        tallied: Tallied = "no",
        hint: str = "",
    ) -> None:
        """Raises DataDirectoryReadOnly, DiskFull, RecordCorrupt or StoreReadOnly if it cannot be opened.

        `tallied`: whether its records are summed up (tally.py) and their sum is proved here. "new" makes the sum if
        there is none yet; "accept" makes it whatever was there before, and puts what was wrong into `damage`.
        `hint` tells people what to do if the file is damaged.
        """
        self._path = path
        self._reserve_bytes = reserve_bytes
        self.damage: errors.RecordCorrupt | None = None
        self._map = MapFile(path, map_bytes, hint)
        try:
            self._tally = self._open_tally(tallied)
        except BaseException:
            self._map.close()
            raise
        # A SimpleQueue wakes the writer with one lock handed over, a Queue with three; the semaphore bounds it.
        self._queue: queue.SimpleQueue[list[_Batch] | _Task | None] = queue.SimpleQueue()
        self._room = threading.BoundedSemaphore(QUEUED_WRITES)
        self._gathering = threading.local()
        self._submit_lock = threading.Lock()
        self._closed = False
        self._failed: BaseException | None = None
        self._commits = self._batches = 0
        self._writer = threading.Thread(target=self._run, name=f"writer-{os.path.basename(path)}", daemon=True)
        self._writer.start()

    def read(self) -> contextlib.AbstractContextManager[ReadTxn]:
        """A read transaction whose values are memoryviews, valid inside the `with` block only.

        Keep the block short: a pinned reader makes the file grow. Raises Draining after close().
        """
        return self._map.read()

    def submit(self, ops: Sequence[Op], n_bytes: int, *, frees: bool = False) -> Future[None]:
        """Queue one atomic batch; blocks while the queue is full.

        The future resolves when the batch is durable and cannot be cancelled: what was accepted is carried
        out. It fails with what an op raised (that batch only), DiskFull, or StoreReadOnly. `frees` marks a
        batch that gives space back and is let through below the reserve. Raises Draining after close(). Inside of
        `together` it neither waits nor raises.
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        batch = _Batch(ops, n_bytes, frees, done)
        gathered: list[_Batch] | None = getattr(self._gathering, "batches", None)
        if gathered is not None:
            gathered.append(batch)
        else:
            self._queue_up([batch])
        return done

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What this thread submits inside the block is queued at its end, and becomes durable in one transaction.

        Each batch is still atomic by itself. For small ones: what they write is not bounded. Their futures fail with
        Draining if the store is closed by then; nobody may wait for them inside the block. Blocks do not nest.
        """
        assert getattr(self._gathering, "batches", None) is None, "what the inner block gathers would come first"
        gathered: list[_Batch] = []
        self._gathering.batches = gathered
        try:
            yield
        finally:
            self._gathering.batches = None
            if gathered:
                try:
                    self._queue_up(gathered)
                except errors.Draining as exc:
                    for batch in gathered:
                        batch.done.set_exception(exc)

    def compact(self) -> Future[None]:
        """Queue a copy without free pages, which takes the file's place (compaction.py); what is written next waits.

        The future fails with DiskFull if there is no room for it, DataDirectoryReadOnly or RecordCorrupt if it cannot
        be made (the store goes on as it was), StoreReadOnly. Raises Draining after close().
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        self._queue_up(_Task(lambda: compact_file(self._map, self._reserve_bytes), done))
        return done

    def close(self) -> None:
        """Write what is queued, wait for readers, close. Idempotent."""
        with self._submit_lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._writer.join()
        self._map.close()

    def stat(self) -> EnvironmentStat:
        with self.read() as txn:
            tree, info = txn.stat(self._map.env.open_db(None, txn)), self._map.env.info()
        pages = tree["branch_pages"] + tree["leaf_pages"] + tree["overflow_pages"]
        return EnvironmentStat(
            entries=tree["entries"],
            used_bytes=pages * tree["psize"],
            overflow_bytes=tree["overflow_pages"] * tree["psize"],
            file_bytes=(info["last_pgno"] + 1) * tree["psize"],
            map_bytes=info["map_size"],
            commits=self._commits,
            batches=self._batches,
        )

    def free_bytes(self) -> int:
        """Free space of the file system that holds the environment."""
        return space.free_bytes(self._path)

    @property
    def read_only(self) -> bool:
        """True once a commit failed for another reason than want of space."""
        return self._failed is not None

    def _queue_up(self, item: list[_Batch] | _Task) -> None:
        with self._submit_lock:
            if self._closed:
                raise errors.Draining("the store is closed")
            self._room.acquire()
            self._queue.put(item)

    def _take(self, *, block: bool) -> list[_Batch] | _Task | None:
        """The next item; None is the last. Raises queue.Empty."""
        item = self._queue.get(block)
        if item is not None:
            self._room.release()
        return item

    def _run(self) -> None:
        carried: list[_Batch] | _Task | None = None
        stopping = False
        while carried is not None or not stopping:
            first = carried if carried is not None else self._take(block=True)
            carried = None
            if first is None:
                return
            if isinstance(first, _Task):
                self._perform(first)
                continue
            group, size = first, _size(first)
            while not stopping:
                try:
                    more = self._take(block=False)
                except queue.Empty:
                    break
                if more is None:
                    stopping = True
                elif isinstance(more, _Task) or size + _size(more) > MAX_TXN_BYTES:
                    carried = more
                    break
                else:
                    group += more
                    size += _size(more)
            try:
                self._commit(group)
            except Exception as exc:  # noqa: BLE001 - the writer must not die and leave its callers waiting
                self._fail([batch for batch in group if not batch.done.done()], exc)

    def _perform(self, task: _Task) -> None:
        try:
            if self._failed is not None:
                raise errors.StoreReadOnly(f"an earlier write failed ({self._failed}); restart the daemon")
            task.run()
        except HalfDoneError as exc:
            self._failed = exc
            task.done.set_exception(errors.StoreReadOnly(f"compacting failed: {exc}; the store is read-only"))
        except Exception as exc:  # noqa: BLE001 - the writer must not die and leave its callers waiting
            task.done.set_exception(exc)
        else:
            task.done.set_result(None)

    def _commit(self, group: list[_Batch]) -> None:
        if self._failed is not None:
            reason = f"an earlier write failed ({self._failed}); restart the daemon"
            for batch in group:
                batch.done.set_exception(errors.StoreReadOnly(reason))
            return
        group = self._keep_reserve(group)
        if not group:
            return
        try:
            txn = self._map.env.begin(write=True)
        except lmdb.Error as exc:
            self._fail(group, exc)
            return
        total = self._tally.total if self._tally else 0
        outcomes: list[tuple[_Batch, Exception | None]] = []
        try:
            for batch in group:
                error, change = self._apply(txn, batch)
                outcomes.append((batch, error))
                total += change
        except lmdb.Error as exc:
            txn.abort()  # see _commit_applied
            self._fail(group, exc)
            return
        try:
            self._commit_applied(txn, [batch for batch, error in outcomes if error is None], total % (1 << 128))
        finally:
            # Told only now: a refusal may rest on what another batch of this group wrote, which must be there to read.
            for batch, error in outcomes:
                if error is not None:
                    batch.done.set_exception(error)

    def _commit_applied(self, txn: WriteTxn, applied: list[_Batch], total: int) -> None:
        try:
            if applied:
                if self._tally:
                    self._tally.write(txn, total)
                txn.commit()
            else:
                txn.abort()
        except lmdb.MapFullError as exc:
            txn.abort()  # a traceback may keep it, and then no other can begin
            # Raised while pages are allocated, before any is written: nothing happened, and space may return.
            for batch in applied:
                batch.done.set_exception(from_lmdb(exc, "commit failed"))
            return
        except lmdb.Error as exc:
            txn.abort()  # it may stand open still, and then no other can begin
            self._fail(applied, exc)
            return
        if self._tally:
            self._tally.total = total
        self._commits += 1
        self._batches += len(applied)
        for batch in applied:
            batch.done.set_result(None)

    def _apply(self, parent: WriteTxn, batch: _Batch) -> tuple[Exception | None, int]:
        """Run one batch in a nested transaction, so that its failure is its own; returns it, and the tally's change."""
        txn = self._map.env.begin(write=True, parent=parent)
        view = TalliedTxn(txn)
        acted_on = cast(WriteTxn, view) if self._tally else txn
        try:
            for op in batch.ops:
                op(acted_on)
            txn.commit()
        except Exception as exc:  # noqa: BLE001 - as any executor does: the submitter gets it
            txn.abort()
            return from_lmdb(exc, "write failed") if isinstance(exc, lmdb.Error) else exc, 0
        return None, view.change

    def _open_tally(self, tallied: Tallied) -> Tally | None:
        if tallied == "no":
            return None
        try:
            found = read_tally(self._map, may_lack=tallied == "new")
        except errors.RecordCorrupt as exc:
            if tallied != "accept":
                raise
            self.damage, found = exc, None
        try:
            return found or build_tally(self._map)
        except errors.RecordCorrupt:
            if tallied != "accept":
                raise
            return None  # not even readable as a whole: what can be read is served, and the next start refuses again

    def _low_on_space(self, reserve_bytes: int) -> bool:
        try:
            return self.free_bytes() < reserve_bytes
        except OSError:
            return False  # the write itself will tell

    def _reusable_bytes(self) -> int:
        """Freed pages inside the file, which a write may take without growing it."""
        tree, info = self._map.env.stat(), self._map.env.info()
        used = tree["branch_pages"] + tree["leaf_pages"] + tree["overflow_pages"]
        return int((info["last_pgno"] + 1 - used) * tree["psize"])

    def _keep_reserve(self, group: list[_Batch]) -> list[_Batch]:
        if not self._low_on_space(self._reserve_bytes):
            return group
        kept, reusable = [], self._reusable_bytes()
        for batch in group:
            # Generous: freed pages are scattered. What still grows the file comes out of the reserve.
            needs = 0 if batch.frees else 4 * batch.n_bytes + _SPARE_BYTES
            if needs <= reusable:
                reusable -= needs
                kept.append(batch)
            else:
                why = f"less than {self._reserve_bytes} bytes of disk are free"
                batch.done.set_exception(errors.DiskFull(why, retry_after=_RETRY_SECONDS))
        return kept

    def _fail(self, group: list[_Batch], exc: Exception) -> None:
        """A transaction was not committed. Tell why, and whether the next one may be tried."""
        enough = self._reserve_bytes + _SPARE_BYTES + sum(batch.n_bytes for batch in group)
        full = may_be_out_of_space(exc) and space.is_short(self._path, enough)
        if not full:
            # A failed fsync is never retried: the kernel may have dropped the pages it could not write.
            self._failed = exc
        trouble = self._leave_panic()
        for batch in group:
            failure: errors.SessiondError
            if full:
                failure = errors.DiskFull(f"commit failed: {exc}{trouble}", retry_after=_RETRY_SECONDS)
            else:
                failure = errors.StoreReadOnly(f"commit failed: {exc}; the store is read-only until restart{trouble}")
            failure.__cause__ = exc
            batch.done.set_exception(failure)

    def _leave_panic(self) -> str:
        """Open the file again if LMDB refuses everything since the failure; what went wrong with that, if it did."""
        try:
            if self._map.in_panic():
                self._map.reopen()
        except errors.SessiondError as exc:
            return f"; then {exc}"
        return ""


def _size(batches: Sequence[_Batch]) -> int:
    return sum(batch.n_bytes for batch in batches)
