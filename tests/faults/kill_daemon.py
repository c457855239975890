"""SIGKILL of the whole daemon at named points, tiny real model: the client that comes back sees nothing of it.

Each run holds the same conversation (kill_script.py); every answer must be that of a daemon that is left alone.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from fake_daemon import model_folder
from kill_points import POINTS
from kill_script import Client, DefectError, hold
from outcome import Outcome

from sessiond import verify
from sessiond.clients.errors import SessiondClientError
from sessiond.errors import SessiondError
from sessiond.references import is_referenced
from sessiond.storage.findings import Finding, Severity
from sessiond.storage.store import Store
from sessiond.verify import Verification

RESTART_SECONDS = 10.0
# The point at which a missing defence shows.
SHOWN_AT = {"log_late": "suspend-before", "no_request_lookup": "revision-durable-untold"}
POINTS_IN_TURN = random.Random(0).sample(POINTS, len(POINTS))  # so that the points of a short run lie apart


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    """One kill at each of the `count` points that come after `seed` times as many, round and round: runs of equal
    count with seeds in a row pass all points. `variant`: see `WEAKNESSES`; one point then shows it."""
    settings: dict[str, Any] = {
        "model": str(model_folder()), "listen": "127.0.0.1:0", "threads": 1, "settle_seconds": 0.02,
        "detached_turn_seconds": 0.0, "sweep_seconds": 0.1, "scrub_bytes_per_second": 0.0,
    }  # fmt: skip
    (scratch / "alone").mkdir()
    expected, _ = asyncio.run(_held(scratch / "alone", settings, ""))
    details: list[str] = []
    late: list[str] = []
    lost, twice, slowest, garbage = 0, 0, 0.0, 0
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
        slowest, garbage = max(slowest, client.restart_seconds), garbage + left
        if client.restart_seconds > RESTART_SECONDS:
            late.append(f"seed {seed} point {point}: serving again took {client.restart_seconds:.1f} s")
        if problem := _problem(client, expected):
            details.append(f"seed {seed} point {point}: {problem}")
        shutil.rmtree(folder)
    counts = {"slowest_restart_ms": round(slowest * 1e3), "unreferenced_left_by_kills": garbage}
    return Outcome("kill_daemon", count, len(details), lost, twice, details=details, counts=counts, late=late)


def _problem(client: Client, expected: Client) -> str:
    if client.deaths == 0:
        return "the point was never reached"
    if client.lost_tokens:
        return f"{client.lost_tokens} acknowledged tokens are not in the log"
    for request_id, ids in expected.said.items():
        if request_id in expected.answers and client.said.get(request_id) != ids:
            return f"{request_id} says {client.said.get(request_id)} instead of {ids}"
    return ""


async def _held(folder: Path, settings: dict[str, Any], point: str, weakness: str = "") -> tuple[Client, int]:
    """Hold the conversation in a daemon of its own; then end it and look at its store. Returns what nobody led to."""
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
    """The store needs no mending, and what a kill left behind goes away. Returns how many things that were.

    Every reference leads to whole KV and every session to its revisions (else a finding is more than a notice);
    after one repair no KV is without a reference, and a second look finds nothing.
    """
    with Store.open(data) as store, mock.patch.object(verify, "SECOND_LOOK_SECONDS", 0.0):  # nothing else runs here
        first = _findings(store, repair=True)
        if damage := [one for one in first if one.severity is not Severity.NOTICE or not one.repaired]:
            raise DefectError(f"the store needs more than collecting: {damage[:3]}")
        unreferenced = [owner for owner in store.blocks.owners() if not is_referenced(store, owner)]
        if unreferenced or (second := _findings(store, repair=False)):
            raise DefectError(f"left after a repair: {unreferenced[:3] or second[:3]}")
    return len(first)


def _findings(store: Store, *, repair: bool) -> list[Finding]:
    run = Verification(store, lambda: None, repair=repair).run()
    return [step for step in run if isinstance(step, Finding)]
