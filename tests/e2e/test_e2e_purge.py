"""A purge takes everything of its session along and nothing of the others, whatever state their records are in."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from e2e_daemon import PATIENCE, Gate, Peer, refused
from grpc import StatusCode

from sessiond.v1 import types_pb2


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "detached_turn_seconds": 0.0}


async def test_what_a_suspended_turn_had_said_is_erased(peer: Peer, daemon):
    session = (await peer.create(system="Be brief.")).session_id
    gate = Gate(daemon)
    stream = peer.open(session, "Tell me", max_tokens=30, request_id="turn-1")
    gate.let(4)
    await stream.read_tokens(3)
    stream.cancel()
    await gate.cancelled()
    gate.open()
    async with asyncio.timeout(PATIENCE):
        while (await peer.get(session)).suspended_request_id != "turn-1":  # noqa: ASYNC110 - the daemon's doing
            await asyncio.sleep(0.02)
    log = daemon.desk.store.log
    unborn = log.request("default", session, "turn-1").revision_id
    assert len(log.tokens("default", unborn)[0]) > 0
    await peer.delete(session, purge_now=True)
    assert len(log.tokens("default", unborn)[0]) == 0
    assert log.tenants() == []  # nobody owns a record any more


async def test_deleting_goes_on_below_the_disk_reserve(peer: Peer, daemon, monkeypatch):
    one, other = [(await peer.create(system="Be brief.")).session_id for _ in range(2)]
    for part in (daemon.desk.store.log, daemon.desk.store.blocks):
        monkeypatch.setattr(part._env, "_low_on_space", lambda reserve_bytes: True)
        monkeypatch.setattr(part._env, "_reusable_bytes", lambda: 0)
    with refused("DISK_FULL", StatusCode.RESOURCE_EXHAUSTED):
        await peer.create(system="Be brief.")
    assert (await peer.delete(one)).session.state == types_pb2.SESSION_STATE_DELETED
    with refused("DISK_FULL", StatusCode.RESOURCE_EXHAUSTED):
        await peer.undelete(one)
    for session in (one, other):
        await peer.delete(session, purge_now=True)
    assert daemon.desk.store.log.tenants() == []
