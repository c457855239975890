"""Where models lie on this machine, and the rules for writing there.

<cache>/models/<name>/<file>.gguf    verified downloads
<cache>/models/converted/<sha256>/   transformers directories
<cache>/models/digests/              digests, keyed by path, size and modification time
<cache>/models/.lock                 held while a download or a directory is made
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from sessiond.errors import DiskFull, ModelMissing


def cache_root() -> Path:
    """$SESSIOND_CACHE, else $XDG_CACHE_HOME/sessiond, else ~/.cache/sessiond."""
    if explicit := os.environ.get("SESSIOND_CACHE"):
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification has relative paths ignored.
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "sessiond"


def models_dir() -> Path:
    return cache_root() / "models"


def digests_dir() -> Path:
    """Where digests of files are remembered; safe to delete."""
    return models_dir() / "digests"


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the model cache for writing; waits for another process that fetches or converts.

    Raises DiskFull and ModelMissing for what the disk refuses while it is held.
    """
    import fcntl

    try:
        models_dir().mkdir(parents=True, exist_ok=True)
        with (models_dir() / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also by a kill
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left for models in {models_dir()}; free some or set SESSIOND_CACHE"
            raise DiskFull(message) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise ModelMissing(
                f"the model cache {models_dir()} cannot be written ({error.strerror}); "
                "set SESSIOND_CACHE to a folder that can"
            ) from error
        raise


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """SHA-256 of a file, computed once for each path, size, modification time and inode."""
    stat = path.stat()
    key = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}".encode()).hexdigest()
    slot = digests_dir() / f"{key[:32]}.sha256"
    with contextlib.suppress(OSError, ValueError):
        found = slot.read_text("ascii")
        if re.fullmatch(r"[0-9a-f]{64}", found):
            return found
    digest = sha256_of(path)
    with contextlib.suppress(OSError):  # remembering saves time only
        slot.parent.mkdir(parents=True, exist_ok=True)
        partial = slot.with_suffix(f".{os.getpid()}")
        partial.write_text(digest, "ascii")
        partial.replace(slot)
    return digest
