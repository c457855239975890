"""Giving free pages back: LMDB files never shrink, so a copy without them takes the file's place.

    copy -> fsync -> open the copy -> readers leave -> rename -> readers come back -> fsync of the folder

A death before the rename leaves the old file and a copy that the next open removes; after it, the new one. The writer
does all this itself, so nothing is written meanwhile; readers wait for the rename only.
"""

from __future__ import annotations

import contextlib
import os

import lmdb

from sessiond import errors
from sessiond.storage import space
from sessiond.storage.directory import sync_folder
from sessiond.storage.failures import from_lmdb, from_os
from sessiond.storage.mapfile import COMPACT_NAME, HalfDoneError, MapFile

_RETRY_SECONDS = 10.0


def compact_file(file: MapFile, reserve_bytes: int) -> None:
    """Replace the file by a compact copy. On the writer's thread, between two transactions.

    Raises DiskFull, before anything is written, if the copy would leave less than `reserve_bytes` free; DiskFull,
    DataDirectoryReadOnly or RecordCorrupt if there can be none. These leave the old file in use and writable;
    HalfDoneError the new one, to which nothing may be written.
    """
    copy = os.path.join(file.path, COMPACT_NAME)
    wanted = _copy_bytes(file)
    if (free := space.free_bytes(file.path)) < wanted + reserve_bytes:
        why = f"the compact copy takes {wanted} bytes, and {reserve_bytes} are kept in reserve, but {free} are free"
        raise errors.DiskFull(why, retry_after=_RETRY_SECONDS, wanted_bytes=wanted, free_bytes=free)
    try:
        _write_copy(file, copy)
        file.take_copy()
    except (errors.StoreReadOnly, errors.DataDirectoryReadOnly) as exc:  # says nothing about the file in use
        raise errors.DataDirectoryReadOnly(f"{exc.message}; the store goes on with the file it has") from exc
    finally:
        with contextlib.suppress(OSError):
            file.remove_copy()
    try:
        sync_folder(file.path)
    except OSError as exc:
        raise HalfDoneError(f"the new file's name may not survive a power loss: {exc}") from exc


def _copy_bytes(file: MapFile) -> int:
    """What the copy takes: all pages of the tree, and the two meta pages."""
    try:
        tree = file.env.stat()
    except lmdb.Error as exc:
        raise from_lmdb(exc, "cannot look at the file") from exc
    return int((tree["branch_pages"] + tree["leaf_pages"] + tree["overflow_pages"] + 2) * tree["psize"])


def _write_copy(file: MapFile, copy: str) -> None:
    """Make the copy durable under a name of its own."""
    try:
        fd = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            file.env.copyfd(fd, compact=True)
            os.fsync(fd)
        finally:
            os.close(fd)
    except lmdb.Error as exc:
        raise from_lmdb(exc, "cannot write a compact copy") from exc
    except OSError as exc:
        raise from_os(exc, "cannot write a compact copy") from exc
