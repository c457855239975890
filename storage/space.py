"""Is there space left? What a file system says of itself, and what it says when asked for some."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def free_bytes(folder: str) -> int:
    """Free space of the file system that holds `folder`, for whoever is not root."""
    fs = os.statvfs(folder)
    return fs.f_bavail * fs.f_frsize


def is_short(folder: str, n_bytes: int) -> bool:
    """True if `folder` cannot take `n_bytes` more: the file system has less, or a quota forbids them.

    What cannot be found out counts as space: only a shortage that shows is one.
    """
    try:
        if free_bytes(folder) < n_bytes:
            return True
    except OSError:
        return False
    return _is_refused(os.path.join(folder, f".space-{secrets.token_hex(4)}"), n_bytes)


def _is_refused(path: str, n_bytes: int) -> bool:
    """Reserve `n_bytes` for a moment: quotas do not show in statvfs."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        return exc.errno in _FULL
    try:
        os.posix_fallocate(fd, 0, n_bytes)
    except OSError as exc:
        return exc.errno in _FULL
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)
    return False
