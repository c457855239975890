"""The data directory itself: its lock and its FORMAT file (docs/format.md)."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from sessiond import errors
from sessiond.storage.envelope import canonical_json
from sessiond.storage.failures import from_os

FORMAT = 1
MAX_CELL_TOKENS = 1 << 16
_MAX_FORMAT_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Format:
    """What FORMAT says. Unknown keys of a readable version are ignored."""

    format: int
    cell_tokens: int
    created_by: str
    created_us: int
    tallied: bool  # the log keeps a tally (tally.py); only directories of early versions do not


class DirectoryLock:
    """The exclusive right to a data directory, held until `release` or the process ends."""

    def __init__(self, root: Path) -> None:
        """Creates `root` if needed. Raises DataDirectoryBusy or DataDirectoryReadOnly."""
        try:
            _make_folder(root)
            self._fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise from_os(exc, f"cannot use {root} as data directory") from exc
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(self._fd)
            raise errors.DataDirectoryBusy(f"{root} is in use by another daemon") from exc
        except OSError as exc:
            os.close(self._fd)
            raise from_os(exc, f"cannot lock {root} (is it on a file system without flock?)") from exc
        try:
            # A read-only mount or a full disk shows here, even for root whom modes do not stop.
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as exc:
            self.release()
            raise from_os(exc, f"cannot write to {root}") from exc

    def release(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_or_create_format(root: Path, cell_tokens: int) -> Format:
    """The directory's FORMAT; written with `cell_tokens` if it has none yet. Hold the lock.

    Raises FormatTooNew, RecordCorrupt (unreadable FORMAT, or none beside existing data),
    InvalidConfig (cell_tokens out of range), DataDirectoryReadOnly or DiskFull.
    """
    path = root / "FORMAT"
    try:
        with path.open("rb") as file:
            return _parse(path, file.read(_MAX_FORMAT_BYTES))
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise from_os(exc, f"cannot read {path}") from exc
    if (root / "log").exists():
        raise errors.RecordCorrupt(f"{path} is missing beside existing data", key="FORMAT")
    if not 1 <= cell_tokens <= MAX_CELL_TOKENS:
        raise errors.InvalidConfig(f"cell_tokens must be within 1 to {MAX_CELL_TOKENS}, not {cell_tokens}")
    created = Format(FORMAT, cell_tokens, _version(), time.time_ns() // 1000, tallied=True)
    _write_format(path, created)
    return created


def mark_tallied(root: Path, form: Format) -> None:
    """Note that the log has a tally from now on. Raises DataDirectoryReadOnly or DiskFull."""
    _write_format(root / "FORMAT", replace(form, tallied=True))


def _write_format(path: Path, form: Format) -> None:
    said = {name: getattr(form, name) for name in Format.__slots__}
    _write_atomically(path, canonical_json({**said, "check": _check(said)}) + b"\n")


def _check(said: dict[str, Any]) -> str:
    """Over everything else that FORMAT says."""
    rest = {name: value for name, value in said.items() if name != "check"}
    return str(xxh3_128_hexdigest(canonical_json(rest)))


def _parse(path: Path, raw: bytes) -> Format:
    try:
        said: dict[str, Any] = json.loads(raw)
        version = int(said["format"])
        if version > FORMAT:
            raise errors.FormatTooNew(
                f"{path.parent} has format {version}, written by "
                f"{said.get('created_by', 'a newer version')}; "
                f"this version reads up to {FORMAT}",
                format=version,
                supported=FORMAT,
            )
        if said.get("check", _check(said)) != _check(said):  # early versions wrote none
            raise ValueError("checksum mismatch")
        cell_tokens = int(said["cell_tokens"])
        if version < 1 or not 1 <= cell_tokens <= MAX_CELL_TOKENS:
            raise ValueError("value out of range")
        return Format(
            version, cell_tokens, str(said["created_by"]), int(said["created_us"]), said.get("tallied") is True
        )
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise errors.RecordCorrupt(f"{path} is damaged: {exc!r}", key="FORMAT") from exc


def _write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync, rename, fsync the directory: after a crash there is the whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as exc:
        raise from_os(exc, f"cannot write {path}") from exc


def sync_folder(folder: str | Path) -> None:
    """Make the names in `folder` durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_names(root: Path) -> None:
    """`sync_folder` with our errors: DiskFull or DataDirectoryReadOnly."""
    try:
        sync_folder(root)
    except OSError as exc:
        raise from_os(exc, f"cannot sync {root}") from exc


def _make_folder(root: Path) -> None:
    """Make `root` and what is missing above it. Its own name is synced always: a start that died may have made it."""
    missing = [folder for folder in root.absolute().parents if not folder.exists()]
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # a parent that we may not read: nothing of ours was made in it
        for folder in (root.absolute().parent, *(folder.parent for folder in missing)):
            sync_folder(folder)


def _version() -> str:
    try:
        return importlib.metadata.version("sessiond")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
