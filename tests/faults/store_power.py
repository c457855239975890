"""Power loss at a random instant, on a file system that forgets what was not synced; several in a row on one directory.

Both databases lie on it, LMDB and SQLite. Negative controls: `lmdb_no_sync`, `sqlite_no_sync`, `names_not_synced`,
`compact_no_sync`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child
import lmdb
from check import Checker
from oracle import Oracle, read_oracle
from outcome import Outcome
from volatile import power_loss
from workload import Workload

from sessiond.storage import compaction, database, directory, mapfile
from sessiond.storage.mapfile import MapFile
from sessiond.storage.store import Store

IN_A_ROW = 5
OPTIONS = {"log_map_bytes": 64 << 20, "block_map_bytes": 256 << 20}


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    rng = random.Random(seed)
    failures: list[str] = []
    lost = acknowledged = 0
    for i in range(count):
        chain, position = divmod(i, IN_A_ROW)
        root = scratch / f"chain{chain}"
        disk = root / "disk"
        if position == 0:
            disk.mkdir(parents=True)
        power_loss(disk, writer(root, seed + chain, variant), instant(root, rng), rng)
        code, said = child.ask(lambda root=root, chain=chain: examine(root, seed + chain))
        problems, lost_now, n = json.loads(said) if said else ([f"the checker ended with {code}"], 0, 0)
        lost, acknowledged = lost + lost_now, acknowledged + n
        if problems:
            failures.append(f"seed {seed} loss {i}: {problems[:5]}")
            shutil.rmtree(root)
            disk.mkdir(parents=True)  # what follows is judged by itself
    if acknowledged == 0 and not failures:
        failures.append(f"seed {seed}: no step was ever acknowledged, so nothing was proved")
    return Outcome(
        "store_power", count, len(failures), lost_tokens=lost, details=failures, counts={"acknowledged": acknowledged}
    )


def writer(root: Path, seed: int, variant: str) -> Callable[[Path], None]:
    def write(mount: Path) -> None:
        switch_off(variant)
        oracle = Oracle(root / "oracle")  # not on the volatile disk
        store = Store.open(mount / "data", **OPTIONS)
        (root / "ready").touch()
        Workload(store, oracle, seed).run(1_000_000)

    return write


def instant(root: Path, rng: random.Random) -> Callable[[], None]:
    """When the power goes: mostly while steps are written, now and then while the store is opened or made."""
    ready = root / "ready"
    ready.unlink(missing_ok=True)
    opening, pause = rng.random() < 0.2, rng.uniform(0, 0.4)

    def wait() -> None:
        deadline = time.monotonic() + (0 if opening else 30)
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(pause)

    return wait


def examine(root: Path, seed: int) -> str:
    promises = read_oracle(root / "oracle")
    with Store.open(root / "disk" / "data", **OPTIONS) as store:
        found = Checker(store, promises, seed).check()
    return json.dumps((found.problems, found.lost_tokens, promises.n_acknowledged))


def switch_off(defence: str) -> None:
    if defence == "lmdb_no_sync":
        opened = lmdb.open

        def careless(*args: Any, **settings: Any) -> Any:
            return opened(*args, **{**settings, "sync": False, "metasync": False})

        lmdb.open = careless
    elif defence == "sqlite_no_sync":
        opened_sqlite = database.open_sqlite

        def unsynced(path: Path) -> Any:
            engine = opened_sqlite(path)
            with engine.connect() as connection:
                connection.connection.driver_connection.execute("PRAGMA synchronous=OFF")
            return engine

        database.open_sqlite = unsynced
        from sessiond.storage import catalog

        catalog.open_sqlite = unsynced  # type: ignore[attr-defined]
    elif defence == "compact_no_sync":

        def unsynced_copy(file: MapFile, copy: str) -> None:
            fd = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            file.env.copyfd(fd, compact=True)
            os.close(fd)

        compaction._write_copy = unsynced_copy
    elif defence == "names_not_synced":
        for module in (directory, mapfile, compaction):
            module.sync_folder = lambda _: None  # type: ignore[attr-defined]
    elif defence:
        raise ValueError(defence)
