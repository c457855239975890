"""What the operating system and LMDB report, as our errors."""

from __future__ import annotations

import errno
import os

import lmdb

from sessiond import errors

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
_DAMAGED = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError,
            lmdb.BadChecksumError, lmdb.IncompatibleError)  # fmt: skip


def from_lmdb(exc: BaseException, doing: str, *, opening: bool = False) -> errors.SessiondError:
    """Map an lmdb.Error or OSError. EIO and unknown failures are StoreReadOnly: they may not be harmless."""
    text = f"{doing}: {exc}"
    if is_out_of_space(exc):
        return errors.DiskFull(text)
    if isinstance(exc, _DAMAGED):
        return errors.RecordCorrupt(text)
    if opening and (isinstance(exc, lmdb.ReadonlyError) or errno_of(exc) in _READ_ONLY):
        return errors.DataDirectoryReadOnly(text)
    return errors.StoreReadOnly(text)


def from_os(exc: OSError, doing: str) -> errors.SessiondError:
    """Map an OSError met in the data directory's own files."""
    text = f"{doing}: {exc.strerror or exc}"
    if exc.errno in _FULL:
        return errors.DiskFull(text)
    return errors.DataDirectoryReadOnly(text)


def is_out_of_space(exc: BaseException) -> bool:
    """True when the map or the disk is full. Not seen here: a short write, which LMDB 0.9 reports as EIO."""
    return isinstance(exc, lmdb.MapFullError | lmdb.DiskError) or errno_of(exc) in _FULL


def may_be_out_of_space(exc: BaseException) -> bool:
    """True also for what LMDB 0.9 makes of a short write (EIO) or of a meta page it could not write (MDB_PANIC).

    Whether there really is no space must be asked of the file system.
    """
    return is_out_of_space(exc) or errno_of(exc) == errno.EIO or isinstance(exc, lmdb.PanicError)


def errno_of(exc: BaseException) -> int | None:
    """The errno inside; an lmdb.Error only carries its message ("path: No space left on device")."""
    if isinstance(exc, OSError):
        return exc.errno
    code = getattr(exc, "code", None)
    if isinstance(code, int) and code > 0:
        return code
    text = str(exc)
    return next((n for n in _FULL | _READ_ONLY | {errno.EIO} if text.endswith(os.strerror(n))), None)
