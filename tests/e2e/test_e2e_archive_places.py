"""Few archives at a time, and no tenant or stream that stands still can keep the others out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from e2e_archive import export, import_, parts
from e2e_daemon import PATIENCE, Daemons, peer_of, refused
from grpc import StatusCode

from sessiond.clients.errors import from_rpc_error
from sessiond.exporting import Export
from sessiond.server import Daemon
from sessiond.v1 import sessions_pb2 as pb


@pytest.fixture
async def daemon(daemons: Daemons) -> Daemon:
    return await daemons.start(archive_idle_seconds=0.3, trust_tenant_metadata=True)


async def ended(call: Any) -> str:
    """The reason that a stream ends with."""
    async with asyncio.timeout(PATIENCE):
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return str(getattr(from_rpc_error(error), "reason", ""))
    return ""


async def test_an_import_that_stands_still_is_ended_and_frees_its_place(daemon: Daemon):
    async with peer_of(daemon.port) as peer:
        archive, _ = await export(peer, (await peer.create(system="Be brief.")).session_id)
        calls = []
        for _ in range(2):
            calls.append(peer.sessions.ImportSession(metadata=peer.metadata))
            await calls[-1].write(next(parts(archive)))
        await asyncio.sleep(0.1)
        with refused("QUEUE_FULL", StatusCode.RESOURCE_EXHAUSTED):
            await import_(peer, archive)
        for call in calls:
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
            assert from_rpc_error(caught.value).reason == "STREAM_STALLED"
        await import_(peer, archive)


async def large(self: Export) -> AsyncIterator[bytes]:
    """More than gRPC takes in for a client that does not read."""
    for _ in range(32):
        yield bytes(1 << 20)


async def test_an_export_that_nobody_reads_is_ended_and_frees_its_place(daemon: Daemon, monkeypatch):
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        archive, _ = await export(peer, session)
        monkeypatch.setattr(Export, "chunks", large)
        calls = []
        for _ in range(2):
            calls.append(peer.sessions.ExportSession(pb.ExportSessionRequest(session_id=session)))
            await calls[-1].read()
        with refused("QUEUE_FULL", StatusCode.RESOURCE_EXHAUSTED):
            await import_(peer, archive)
        await asyncio.sleep(0.6)
        await import_(peer, archive)
        assert [await ended(call) for call in calls] == ["STREAM_STALLED"] * 2


async def test_a_tenant_has_no_more_than_its_share(daemon: Daemon):
    async with contextlib.AsyncExitStack() as stack:
        greedy, other = [await stack.enter_async_context(peer_of(daemon.port, tenant=t)) for t in ("greedy", "other")]
        archive, _ = await export(other, (await other.create(system="Be brief.")).session_id)
        for _ in range(2):
            call = greedy.sessions.ImportSession(metadata=greedy.metadata)
            await call.write(next(parts(archive)))
        await asyncio.sleep(0.1)
        with refused("QUEUE_FULL", StatusCode.RESOURCE_EXHAUSTED):
            await import_(greedy, archive)
        await import_(other, archive)
