"""What comes in is on disk without a name until it is checked, and gone whatever happens."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from sessiond.errors import DiskFull, StoreReadOnly
from sessiond.storage.incoming import PREFIX, Incoming, sweep


def test_it_has_no_name_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    with Incoming(tmp_path, 0) as file:
        file.append(b"secret")
        assert list(tmp_path.iterdir()) == []
        assert stat.S_IMODE(os.fstat(file._file.fileno()).st_mode) == 0o600
        assert (file.size, file.read_at(2, 3)) == (6, b"cre")


def test_space_below_the_reserve_is_not_taken(tmp_path: Path) -> None:
    with Incoming(tmp_path, 1 << 60) as file, pytest.raises(DiskFull):
        file.append(b"x")


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, StoreReadOnly)]
)
def test_what_the_disk_says_is_told_by_its_kind(tmp_path: Path, monkeypatch, number: int, error: type) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with Incoming(tmp_path, 0) as file:
        file.append(b"x")
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(error):
            file.read_at(0, 1)
        monkeypatch.setattr(os, "statvfs", fail)
        file._looked_at = -1 << 30
        with pytest.raises(error):
            file.append(b"x")
    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    with pytest.raises(error):
        Incoming(tmp_path, 0)


def test_a_start_sweeps_what_a_death_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}abc").write_bytes(b"half")
    (tmp_path / "FORMAT").write_bytes(b"{}")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["FORMAT"]
