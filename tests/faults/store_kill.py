"""kill -9 of a writing process at a random instant; several kills on one directory, each followed by a restart.

Negative controls: `stream_first` shows tokens before they are durable, `refs_first` writes references before the KV
they name. Both must fail.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import Future
from pathlib import Path

import child
from check import Checker
from oracle import Oracle, read_oracle
from outcome import Outcome
from workload import Workload

from sessiond.storage.batch import LogBatch
from sessiond.storage.store import Store

KILLS_IN_A_ROW = 20
MAPS = {"log_map_bytes": 64 << 20, "block_map_bytes": 256 << 20}


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    rng = random.Random(seed)
    failures: list[str] = []
    lost = acknowledged = 0
    for kill in range(count):
        chain, position = divmod(kill, KILLS_IN_A_ROW)
        root = scratch / f"chain{chain}"
        if position == 0:
            root.mkdir()
        write_and_kill(root, seed + chain, rng, variant)
        code, said = child.ask(lambda root=root, chain=chain: examine(root, seed + chain))
        problems, lost_now, acknowledged_now = json.loads(said) if said else ([f"checker ended with {code}"], 0, 0)
        lost += lost_now
        if problems:
            failures.append(f"seed {seed} kill {kill}: {problems[:5]}")
            shutil.rmtree(root)
            root.mkdir()  # what follows is judged by itself
            continue
        if position == KILLS_IN_A_ROW - 1 or kill == count - 1:
            acknowledged += acknowledged_now
            shutil.rmtree(root)
    if acknowledged == 0 and not failures:
        failures.append(f"seed {seed}: no step was ever acknowledged, so nothing was proved")
    return Outcome(
        "store_kill", count, len(failures), lost_tokens=lost, details=failures, counts={"acknowledged": acknowledged}
    )


def write_and_kill(root: Path, seed: int, rng: random.Random, variant: str) -> None:
    """One writer, killed within a few hundredths of a second of its first step (now and then while it opens)."""
    ready = root / "ready"
    ready.unlink(missing_ok=True)
    pid = child.fork(lambda: write(root, seed, ready, variant))
    if rng.random() < 0.9:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.06))
    os.kill(pid, signal.SIGKILL)
    if (code := child.wait(pid)) != -signal.SIGKILL:
        raise AssertionError(f"the writer ended by itself with {code}")


def write(root: Path, seed: int, ready: Path, variant: str) -> None:
    switch_off(variant)
    store = Store.open(root / "data", **MAPS)
    oracle = Oracle(root / "oracle")
    ready.touch()
    Workload(store, oracle, seed).run(1_000_000)


def examine(root: Path, seed: int) -> str:
    promises = read_oracle(root / "oracle")
    with Store.open(root / "data", **MAPS) as store:
        found = Checker(store, promises, seed).check()
    return json.dumps((found.problems, found.lost_tokens, promises.n_acknowledged))


def switch_off(defence: str) -> None:
    if defence == "stream_first":
        write_token = Workload._token

        def early(self: Workload, session: int, turn: int, i: int) -> Future[None]:
            self.oracle.acknowledge("token", session, turn, i)
            return write_token(self, session, turn, i)

        Workload._token = early  # type: ignore[method-assign]
    elif defence == "refs_first":

        def reversed_order(self: Workload, records: list[tuple[bytes, bytes]], reference: LogBatch) -> None:
            self.store.log.write(reference).result()
            self.store.blocks.write(records).result()

        Workload._records_then_reference = reversed_order  # type: ignore[method-assign]
    elif defence:
        raise ValueError(defence)
