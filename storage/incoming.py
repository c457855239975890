"""What comes in from outside, on disk until it has been checked: a file without a name in the data directory.

It is gone when it is closed, whatever ends the process. Where the system makes no nameless files it has a name for a
moment; `sweep` removes what a death in that moment leaves.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from types import TracebackType

from sessiond import errors
from sessiond.storage.failures import is_out_of_space

PREFIX = "incoming-"
_LOOK_EVERY_BYTES = 8 << 20


class Incoming:
    """Bytes received so far. Written by one thread at a time; readable at any offset."""

    def __init__(self, folder: Path, reserve_bytes: int) -> None:
        """Raises DiskFull or StoreReadOnly. The file has mode 0600."""
        self.size = 0
        self._folder = folder
        self._reserve_bytes = reserve_bytes
        self._looked_at = -_LOOK_EVERY_BYTES
        try:
            self._file = tempfile.TemporaryFile(prefix=PREFIX, dir=folder, buffering=0)  # noqa: SIM115 - closed below
        except OSError as exc:
            raise _failure(exc) from exc

    def append(self, data: bytes) -> None:
        """Raises DiskFull, also while less than the reserve is free, or StoreReadOnly."""
        try:
            if self.size - self._looked_at >= _LOOK_EVERY_BYTES:
                self._looked_at = self.size
                self._keep_reserve()
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        except OSError as exc:
            raise _failure(exc) from exc
        self.size += len(data)

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes, which must be there. Raises StoreReadOnly if the disk does not give them back."""
        assert 0 <= offset <= offset + length <= self.size, (offset, length, self.size)
        parts = []
        try:
            while length:
                part = os.pread(self._file.fileno(), length, offset)
                if not part:
                    raise OSError("the file became shorter")
                parts.append(part)
                offset += len(part)
                length -= len(part)
        except OSError as exc:
            raise _failure(exc) from exc
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Remove it. Idempotent."""
        self._file.close()

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _keep_reserve(self) -> None:
        fs = os.statvfs(self._folder)
        if fs.f_bavail * fs.f_frsize < self._reserve_bytes + _LOOK_EVERY_BYTES:
            raise errors.DiskFull(f"less than {self._reserve_bytes} bytes of disk would stay free", retry_after=10.0)


def sweep(folder: Path) -> None:
    """Remove what a process that died left under a name. The data directory's lock must be held."""
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # what cannot be removed harms nobody, and is tried again at the next start
            path.unlink()


def _failure(exc: OSError) -> errors.SessiondError:
    text = f"an incoming archive cannot be kept: {exc.strerror or exc}"
    return errors.DiskFull(text, retry_after=10.0) if is_out_of_space(exc) else errors.StoreReadOnly(text)
