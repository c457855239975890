"""A small file system runs full, at many sizes, and has space again later. The store is open all the time.

While it is full: what is written is refused with DISK_FULL, what is there is read, and deletions go through (out of
the reserve). Once there is space, writes go through again, in the same process. Three ways of running full:

* `own`: the store's own writes reach the reserve.
* `others`: somebody else fills the disk to the last byte. No reserve is left, and a deletion may be refused too.
* `surprise`: the same, and the store keeps no reserve: LMDB itself meets the full disk, in the middle of a commit.

Negative controls: `no_reserve` (deletions fail when the store filled the disk itself), `stay_read_only` (the store
does not return by itself).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import child
from check import Checker
from oracle import Oracle, read_oracle
from outcome import Outcome, Unavailable
from workload import Workload

from sessiond import errors
from sessiond.storage.environment import Environment
from sessiond.storage.store import Store

RESERVE = 1 << 20
WAYS = ("own", "others", "surprise")
SMALLEST, LARGEST = 3 << 20, 12 << 20
OPTIONS = {"log_map_bytes": 256 << 20, "block_map_bytes": 256 << 20}


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    failures: list[str] = []
    counts = {"refused": 0, "deleted_while_full": 0, "returned": 0}
    lost = 0
    for i in range(count):
        rng = random.Random((seed << 20) + i)
        size = rng.randrange(SMALLEST, LARGEST, 4096)
        way = WAYS[i % len(WAYS)]
        with small_disk(scratch / f"disk{i}", size) as disk:
            code, said = child.ask(lambda: trial(disk, scratch / f"o{i}", seed, rng, way, variant), 120)  # noqa: B023
            report: dict[str, Any] = json.loads(said) if code == 0 else {"problems": [f"ended with {code}"]}
            code, said = child.ask(lambda: examine(disk, scratch / f"o{i}", seed))  # noqa: B023
            found = json.loads(said) if code == 0 else {"problems": [f"checker ended with {code}"]}
        lost += found.get("lost", 0) + report.get("lost", 0)
        for name in counts:
            counts[name] += report.get(name, 0)
        if problems := report["problems"] + found["problems"]:
            failures.append(f"seed {seed} trial {i} ({way}, {size} bytes): {problems[:5]}")
    return Outcome("store_disk_full", count, len(failures), lost_tokens=lost, details=failures, counts=counts)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes. Raises Unavailable where mounting is not allowed."""
    if sys.platform != "linux":
        raise Unavailable("small disks need Linux")
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) != 0:
        raise Unavailable(f"mounting a tmpfs: {os.strerror(ctypes.get_errno())} (run as root)")
    try:
        yield folder
    finally:
        libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH: also if a child is still on its way out


def trial(disk: Path, oracle_path: Path, seed: int, rng: random.Random, way: str, variant: str) -> str:
    """Fill, look, free, look; twice on one open store."""
    switch_off(variant)
    problems: list[str] = []
    report: dict[str, Any] = {"refused": 0, "deleted_while_full": 0, "returned": 0, "lost": 0}
    reserve = 0 if variant == "no_reserve" or way == "surprise" else RESERVE
    foreign = way != "own"
    with Store.open(disk / "data", reserve_bytes=reserve, **OPTIONS) as store:
        work = Workload(store, Oracle(oracle_path), seed)
        work.run(1)
        for _ in range(2):
            if foreign:
                fill(disk / "other", rng.randrange(0, 64 << 10))
            problems += until_full(work, foreign)
            report["refused"] += 1
            found = Checker(store, read_oracle(oracle_path), seed, live=True).check()
            problems += [f"while full: {problem}" for problem in found.problems]
            report["lost"] += found.lost_tokens
            deleted, why = delete_something(work)
            report["deleted_while_full"] += deleted
            if not deleted and not (foreign and isinstance(why, errors.DiskFull)):
                problems.append(f"while full nothing can be deleted: {why!r}")
            free(disk, store)
            try:
                work.run(2)
                report["returned"] += 1
            except errors.SessiondError as exc:
                problems.append(f"there is space again, but {exc!r}")
                break
    return json.dumps({**report, "problems": problems})


def until_full(work: Workload, foreign: bool) -> list[str]:
    """Write until that is refused, which must be by DISK_FULL; then once more."""
    problems = []
    for _ in range(2):
        try:
            work.run(100 if foreign else 0)
            while not foreign:
                work.bulk()
            problems.append("the disk never ran full")
        except errors.DiskFull:
            pass
        except errors.SessiondError as exc:
            problems.append(f"a full disk gives {exc!r}")
    if work.store.log._env.read_only or work.store.blocks._env.read_only:
        problems.append("a full disk makes the store read-only")
    return problems


def delete_something(work: Workload) -> tuple[bool, errors.SessiondError | None]:
    try:
        work.delete_bulk()
        work.purge_oldest()
    except errors.SessiondError as exc:
        return False, exc
    return True, None


def fill(path: Path, left: int) -> None:
    """Take all space but about `left` bytes, as another program might."""
    with path.open("ab", buffering=0) as file:
        for step in (1 << 20, 1 << 16, 4096):
            try:
                while file.write(bytes(step)) == step:
                    pass
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise
        file.truncate(max(0, file.tell() - left))


def free(disk: Path, store: Store) -> None:
    """Others give back what they took, and the disk grows where the store's own files fill it."""
    (disk / "other").unlink(missing_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    size = os.statvfs(disk).f_blocks * os.statvfs(disk).f_frsize + (4 << 20)
    assert libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 32, f"size={size}".encode()) == 0  # MS_REMOUNT
    assert store.free_bytes() > RESERVE


def examine(disk: Path, oracle_path: Path, seed: int) -> str:
    with Store.open(disk / "data", reserve_bytes=RESERVE, **OPTIONS) as store:
        found = Checker(store, read_oracle(oracle_path), seed).check()
    return json.dumps({"problems": [f"after a restart: {p}" for p in found.problems], "lost": found.lost_tokens})


def switch_off(defence: str) -> None:
    if defence == "stay_read_only":
        fail = Environment._fail

        def stay(self: Environment, group: list[Any], exc: Exception) -> None:
            fail(self, group, exc)
            self._failed = exc

        Environment._fail = stay  # type: ignore[method-assign]
    elif defence and defence != "no_reserve":
        raise ValueError(defence)
