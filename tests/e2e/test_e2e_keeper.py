"""What the daemon does by itself happens only where the log agrees: its index may lag behind."""

from __future__ import annotations

import asyncio

import pytest
from e2e_daemon import Daemons, peer_of

from sessiond.server import Daemon
from sessiond.storage.catalog import SessionRow
from sessiond.v1 import types_pb2


async def index_is_right(daemon: Daemon, session_id: str) -> None:
    """Wait until the index holds what the log says."""
    assert daemon.desk is not None
    desk = daemon.desk
    async with asyncio.timeout(10):
        while True:
            due = await desk.in_sql(desk.store.catalog.due, desk.now_us())
            if session_id not in {key.session_id for key in (*due.expired, *due.purgeable)}:
                return
            await asyncio.sleep(0.02)


@pytest.fixture
async def sweeping(daemons: Daemons) -> Daemon:
    return await daemons.start(sweep_seconds=0.05, delete_retention_seconds=0.5)


async def test_a_session_brought_back_is_not_purged_by_an_index_that_lags(sweeping, monkeypatch):
    async with peer_of(sweeping.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        await peer.delete(session)
        with monkeypatch.context() as patch:
            patch.setattr(sweeping.desk, "index", lambda record: None)  # SQL is away for a moment
            await peer.undelete(session)
            await asyncio.sleep(1)
            assert (await peer.get(session)).state == types_pb2.SESSION_STATE_ACTIVE
        await index_is_right(sweeping, session)
        assert (await peer.get(session)).state == types_pb2.SESSION_STATE_ACTIVE


async def test_a_session_whose_expiry_moved_is_not_deleted_by_an_index_that_lags(sweeping):
    async with peer_of(sweeping.port) as peer:
        session = (await peer.create(system="Be brief.", ttl=1000)).session_id
        record = sweeping.desk.store.log.session("default", session)
        stale = SessionRow.of(record)
        stale = type(stale)(**{name: getattr(stale, name) for name in stale.__slots__} | {"expire_us": 1})
        await sweeping.desk.in_sql(sweeping.desk.store.catalog.upsert_sessions, [stale])
        await asyncio.sleep(0.2)
        await index_is_right(sweeping, session)
        assert (await peer.get(session)).state == types_pb2.SESSION_STATE_ACTIVE


async def test_a_purge_that_waits_for_its_session_looks_at_what_happened_meanwhile(sweeping, monkeypatch):
    async with peer_of(sweeping.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        await peer.delete(session)
        live = sweeping.desk.live("default", session)
        async with live.lease:
            await asyncio.sleep(1)  # purgeable by now; the keeper must not wait for the lease
            undeleting = asyncio.create_task(peer.undelete(session))
            await asyncio.sleep(0.1)
        await undeleting
        await asyncio.sleep(0.2)
        assert (await peer.get(session)).state == types_pb2.SESSION_STATE_ACTIVE
