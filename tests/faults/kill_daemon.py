"""SIGKILL of the whole daemon at named points, tiny real model: the client that comes back sees nothing of it.

Each run holds the same conversation (kill_script.py); every answer must be that of a daemon that is left alone.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

from fake_daemon import model_folder
from kill_points import POINTS
from kill_script import Client, DefectError, hold
from outcome import Outcome

from sessiond.clients.errors import SessiondClientError
from sessiond.errors import SessiondError
from sessiond.storage.kv import KVOwner
from sessiond.storage.store import Store

RESTART_SECONDS = 10.0
# The point at which a missing defence shows.
SHOWN_AT = {"log_late": "suspend-before", "no_request_lookup": "revision-durable-untold"}
POINTS_IN_TURN = random.Random(0).sample(POINTS, len(POINTS))  # so that the points of a short run lie apart


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    """One kill at each of the `count` points that come after `seed` times as many, round and round: runs of equal
    count with seeds in a row pass all points. `variant`: see `WEAKNESSES`; one point then shows it."""
    settings: dict[str, Any] = {
        "model": str(model_folder()), "listen": "127.0.0.1:0", "threads": 1, "settle_seconds": 0.02,
        "detached_turn_seconds": 0.0, "sweep_seconds": 0.1,
    }  # fmt: skip
    (scratch / "alone").mkdir()
    expected, _ = asyncio.run(_held(scratch / "alone", settings, ""))
    details: list[str] = []
    lost, twice, slowest, orphans = 0, 0, 0.0, 0
    for trial in range(count):
        point = SHOWN_AT[variant] if variant else POINTS_IN_TURN[(seed * count + trial) % len(POINTS)].name
        folder = scratch / f"{trial}-{point}"
        folder.mkdir()
        try:
            client, left = asyncio.run(_held(folder, settings, point, variant))
        except (DefectError, SessiondClientError, SessiondError, TimeoutError) as error:
            details.append(f"seed {seed} point {point}: {type(error).__name__}: {error}")
            continue
        lost, twice = lost + client.lost_tokens, twice + client.turns_twice
        slowest, orphans = max(slowest, client.restart_seconds), orphans + left
        if problem := _problem(client, expected):
            details.append(f"seed {seed} point {point}: {problem}")
        shutil.rmtree(folder)
    counts = {"slowest_restart_ms": round(slowest * 1e3), "orphaned_records": orphans}
    return Outcome("kill_daemon", count, len(details), lost, twice, details=details, counts=counts)


def _problem(client: Client, expected: Client) -> str:
    if client.deaths == 0:
        return "the point was never reached"
    if client.lost_tokens:
        return f"{client.lost_tokens} acknowledged tokens are not in the log"
    if client.restart_seconds > RESTART_SECONDS:
        return f"serving again took {client.restart_seconds:.1f} s"
    for request_id, ids in expected.said.items():
        if request_id in expected.answers and client.said.get(request_id) != ids:
            return f"{request_id} says {client.said.get(request_id)} instead of {ids}"
    return ""


async def _held(folder: Path, settings: dict[str, Any], point: str, weakness: str = "") -> tuple[Client, int]:
    """Hold the conversation in a daemon of its own; then end it and look at its store. Returns orphaned records."""
    client = Client(folder, settings | {"data_dir": folder / "data"}, point, weakness)
    try:
        async with client.connected():
            await hold(client)
        client.daemon.terminate()
        if client.daemon.was_killed:  # a point that lies in the draining
            client.deaths += 1
            await client._revive_process()
            client.daemon.terminate()
        elif client.daemon.process.exitcode != 0:
            raise DefectError(f"the daemon ended with {client.daemon.process.exitcode}: {client.daemon.report()}")
    finally:
        client.daemon.kill()
    return client, examine(folder / "data")


def examine(data: Path) -> int:
    """Every reference leads to whole KV. Returns the KV records' owners that no reference names."""
    with Store.open(data) as store:
        log, named = store.log, set()
        for ref in log.all_cell_refs("default"):
            named.add(KVOwner("default", "cell", ref.prefix_hash))
        for session in log.sessions("default"):
            for revision in log.revisions_of_session("default", session.session_id):
                if tail := log.tail_ref("default", revision.revision_id):
                    named.add(KVOwner("default", "tail", revision.revision_id.encode(), tail.generation))
        there = set(store.blocks.owners("default"))
        if missing := named - there:
            raise DefectError(f"{len(missing)} references name KV that is not there: {next(iter(missing))}")
        return len(there - named)
