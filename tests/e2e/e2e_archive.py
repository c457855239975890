"""Archives in tests: taken from a daemon, given to one, taken apart and put together wrong."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from typing import Any

import grpc
from e2e_daemon import PATIENCE, Peer

from sessiond.clients.archive import ArchiveReader
from sessiond.clients.errors import from_rpc_error
from sessiond.v1 import sessions_pb2 as pb


async def export(peer: Peer, session_id: str, **fields: Any) -> tuple[bytes, pb.ArchiveHeader]:
    """The whole archive, its stream checked as a client does."""
    request = pb.ExportSessionRequest(session_id=session_id, **fields)
    reader, pieces = ArchiveReader(), []
    async with asyncio.timeout(PATIENCE):
        try:
            async for part in peer.sessions.ExportSession(request, metadata=peer.metadata):
                pieces.append(reader.receive(part))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    reader.end_of_stream()
    assert reader.header is not None
    return b"".join(pieces), reader.header


def parts(archive: bytes, *, chunk: int = 1 << 20, **header: Any) -> Iterator[pb.ImportSessionRequest]:
    yield pb.ImportSessionRequest(header=pb.ImportHeader(**header))
    for at in range(0, len(archive), chunk):
        yield pb.ImportSessionRequest(chunk=archive[at : at + chunk])
    trailer = pb.ArchiveTrailer(sha256=hashlib.sha256(archive).digest(), total_bytes=len(archive))
    yield pb.ImportSessionRequest(trailer=trailer)


async def send(peer: Peer, messages: Any) -> pb.ImportSessionResponse:
    async with asyncio.timeout(PATIENCE):
        try:
            return await peer.sessions.ImportSession(iter(messages), metadata=peer.metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


async def import_(peer: Peer, archive: bytes, **header: Any) -> pb.ImportSessionResponse:
    return await send(peer, parts(archive, **header))
