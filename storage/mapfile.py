"""The LMDB file behind an Environment: made so that a crash leaves all or nothing, opened, opened again, closed.

LMDB answers everything with MDB_PANIC, reads too, once it could not write its meta page. Opening the file again
cures that. No reader may be inside meanwhile, so all of them pass through here.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

import lmdb

from sessiond import errors
from sessiond.storage.directory import sync_folder
from sessiond.storage.failures import from_lmdb, from_os
from sessiond.storage.structure import check_structure

LIB_VERSION = 0  # LMDB 0.9: docs/decisions/0001-lmdb-version.md
MAX_READERS = 1024
COMPACT_NAME = "compact.mdb"  # a copy being made (compaction.py); one that is found at open was not finished
REOPEN_SECONDS = 10.0  # how long readers may take to leave
_LOCK_NAME = "lock.mdb"
_LOCK_FILE_BYTES = (MAX_READERS + 64) * 64  # a slot is a cache line; the header takes some more

Env: TypeAlias = "lmdb.Environment"
WriteTxn: TypeAlias = "lmdb.Transaction[bytes]"
ReadTxn: TypeAlias = "lmdb.Transaction[memoryview]"


class HalfDoneError(Exception):
    """Another file is in use now, but something that belongs to it failed: nothing may be written to it."""


class MapFile:
    """An open LMDB file in the folder `path`. Thread-safe; must not be used across fork()."""

    def __init__(self, path: str, map_bytes: int, hint: str = "") -> None:
        """`hint` tells people what to do if the file is damaged.

        Raises DataDirectoryReadOnly, DiskFull, RecordCorrupt or StoreReadOnly if it cannot be opened.
        """
        self.path = path
        self._map_bytes = map_bytes
        self._readers = 0
        self._gate = threading.Condition()
        self._reopening = False
        self._closed = False
        self._n_opened = 0
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)  # lmdb.open would give the folder the file's mode
            if not os.path.exists(os.path.join(path, "data.mdb")):
                self._create()
            self.remove_copy()
            check_structure(path, hint)
            _allocate_lock_file(os.path.join(path, _LOCK_NAME))
        except OSError as exc:
            raise from_os(exc, f"cannot make {os.path.basename(path)}") from exc
        self.env = self._open(path)

    @contextlib.contextmanager
    def read(self) -> Iterator[ReadTxn]:
        """A read transaction. Raises Draining after close()."""
        with self._inside() as txn:
            try:
                yield txn
            except lmdb.Error as exc:
                raise from_lmdb(exc, "read failed") from exc

    def reopen(self) -> None:
        """Close and open the file again; readers wait outside.

        Raises DiskFull, and changes nothing, if those inside stay longer than REOPEN_SECONDS. Raises what opening
        does: then every read and write does, until a later reopen succeeds.
        """
        with self._nobody_inside():
            self.env.close()
            self.env = self._open(self.path)

    def take_copy(self) -> None:
        """Let the file COMPACT_NAME take the place of the one in use. The folder is not synced.

        It is opened before the other is closed. Raises what opening does, DiskFull as reopen() does, or
        DataDirectoryReadOnly: the file in use then stays. Raises HalfDoneError where the new one is in use, but its
        lock file could not be renamed: other programs would not meet the slots of this one's readers.
        """
        copy = os.path.join(self.path, COMPACT_NAME)
        try:
            _allocate_lock_file(f"{copy}-lock")
        except OSError as exc:
            raise from_os(exc, "cannot open the compact copy") from exc
        new = self._open(copy)
        try:
            with self._nobody_inside():
                try:
                    os.replace(copy, os.path.join(self.path, "data.mdb"))
                except OSError as exc:
                    raise from_os(exc, "cannot replace the file by its compact copy") from exc
                new, self.env = self.env, new
                try:
                    os.replace(f"{copy}-lock", os.path.join(self.path, _LOCK_NAME))
                except OSError as exc:
                    raise HalfDoneError(f"the lock file cannot be renamed: {exc.strerror}") from exc
        finally:
            new.close()

    def remove_copy(self) -> None:
        """Remove a copy that takes no place, if there is one."""
        for name in (COMPACT_NAME, f"{COMPACT_NAME}-lock"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.path, name))

    def in_panic(self) -> bool:
        """Whether LMDB refuses everything until the file is opened again, or it could not be. For the writer's use."""
        try:
            self.env.begin(write=True).abort()
        except lmdb.Error:
            return True
        return False

    def close(self) -> None:
        """Wait for readers, close. Idempotent."""
        with self._gate:
            self._closed = True
            self._gate.wait_for(lambda: self._readers == 0)
            self.env.close()

    @contextlib.contextmanager
    def _inside(self) -> Iterator[ReadTxn]:
        with self._gate:
            txn = self._begin()
            self._readers += 1
        try:
            with txn:
                yield txn
        finally:
            with self._gate:
                self._readers -= 1
                if self._readers == 0:
                    self._gate.notify_all()

    def _begin(self) -> ReadTxn:
        """Begin a read; one that meets MDB_PANIC waits for the writer to open the file again. Hold the gate."""
        while True:
            self._gate.wait_for(lambda: not self._reopening)
            if self._closed:
                raise errors.Draining("the store is closed")
            seen = self._n_opened
            try:
                return self.env.begin(buffers=True)
            except lmdb.PanicError as exc:
                if not self._gate.wait_for(self._opened_since(seen), REOPEN_SECONDS):
                    raise from_lmdb(exc, "read failed") from exc
            except lmdb.Error as exc:
                raise from_lmdb(exc, "read failed") from exc

    def _opened_since(self, seen: int) -> Callable[[], bool]:
        return lambda: self._n_opened != seen

    @contextlib.contextmanager
    def _nobody_inside(self) -> Iterator[None]:
        """Readers wait outside for the length of the block. Raises DiskFull if those inside stay too long."""
        with self._gate:
            self._reopening = True
            try:
                if not self._gate.wait_for(lambda: self._readers == 0, REOPEN_SECONDS):
                    raise errors.DiskFull("a reader keeps the store from being opened again", retry_after=1.0)
                yield
            finally:
                self._reopening = False
                self._gate.notify_all()

    def _open(self, path: str) -> Env:
        """Open a folder's data.mdb, or a file."""
        try:
            env = lmdb.open(
                path, subdir=path == self.path, map_size=self._map_bytes, lib_version=LIB_VERSION,
                max_readers=MAX_READERS, max_spare_txns=16, writemap=False, sync=True, metasync=True, readahead=True,
                mode=0o600,
            )  # fmt: skip
            env.reader_check()  # readers of a killed daemon would pin old pages
        except (lmdb.Error, OSError) as exc:
            raise from_lmdb(exc, f"cannot open {os.path.basename(path)}", opening=True) from exc
        self._n_opened += 1
        return env

    def _create(self) -> None:
        """Make an empty file under another name, sync it, and only then give it its name.

        LMDB writes a new file's two meta pages without a sync. After a power loss one of them may be there and the
        other not, and LMDB refuses to open that; and it syncs no folder, so the file itself may be gone.
        """
        new = os.path.join(self.path, "new.mdb")
        for stale in (new, f"{new}-lock"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(stale)
        try:
            env = lmdb.open(new, subdir=False, map_size=1 << 20, lib_version=LIB_VERSION, mode=0o600)
            try:
                env.sync(True)
            finally:
                env.close()
        except lmdb.Error as exc:
            raise from_lmdb(exc, f"cannot make {os.path.basename(self.path)}", opening=True) from exc
        os.unlink(f"{new}-lock")
        os.replace(new, os.path.join(self.path, "data.mdb"))
        for folder in (self.path, os.path.dirname(self.path) or "."):
            sync_folder(folder)


def _allocate_lock_file(path: str) -> None:
    """Give every reader's slot its disk block now: touching a hole of a mapped file on a full disk is SIGBUS.

    Before LMDB opens it: closing another descriptor of the file would drop LMDB's lock.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _LOCK_FILE_BYTES)
    finally:
        os.close(fd)
