"""Archives in tests: taken from a daemon, given to one, taken apart and put together wrong."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import numpy as np
from blake3 import blake3
from e2e_daemon import PATIENCE, Peer
from safetensors import deserialize
from xxhash import xxh3_128

from sessiond.clients.archive import ArchiveReader
from sessiond.clients.errors import from_rpc_error
from sessiond.v1 import archive_pb2
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


async def send(peer: Peer, messages: Iterable[pb.ImportSessionRequest]) -> pb.ImportSessionResponse:
    """Import. Again if grpc's asyncio client lost the answer of a server that ended the call while it still wrote
    (https://github.com/grpc/grpc/issues/36066): such an import was refused."""
    kept = list(messages)
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await peer.sessions.ImportSession(iter(kept), metadata=peer.metadata)
            except grpc.aio.AioRpcError as error:
                if error.details() != "Internal error from Core":
                    raise from_rpc_error(error) from error


async def import_(peer: Peer, archive: bytes, **header: Any) -> pb.ImportSessionResponse:
    return await send(peer, parts(archive, **header))


_HEAD, _FRAME = struct.Struct("<8sIIQ"), struct.Struct("<IIQ")

Blocks = list[tuple[archive_pb2.ArchiveBlock, bytes]]


def take_apart(archive: bytes) -> tuple[archive_pb2.ArchiveManifest, Blocks]:
    """Manifest, and each block's header and safetensors file."""
    length = _HEAD.unpack_from(archive)[3]
    at = _HEAD.size + length
    manifest = archive_pb2.ArchiveManifest.FromString(archive[_HEAD.size : at])
    blocks: Blocks = []
    while (n_header := _FRAME.unpack_from(archive, at)[0]) != 0:
        n_blob = _FRAME.unpack_from(archive, at)[2]
        at += _FRAME.size
        header = archive_pb2.ArchiveBlock.FromString(archive[at : at + n_header])
        blocks.append((header, archive[at + n_header : at + n_header + n_blob]))
        at += n_header + n_blob
    assert at + _FRAME.size + 32 == len(archive)
    return manifest, blocks


def put_together(manifest: archive_pb2.ArchiveManifest, blocks: Blocks) -> bytes:
    """The archive of these parts, with a hash that fits."""
    raw = manifest.SerializeToString(deterministic=True)
    out = _HEAD.pack(b"SnsdArch", 1, 0, len(raw)) + raw
    for header, blob in blocks:
        head = header.SerializeToString(deterministic=True)
        out += _FRAME.pack(len(head), 0, len(blob)) + head + blob
    return hashed(out + bytes(_FRAME.size))


def hashed(content: bytes) -> bytes:
    return content + blake3(content).digest()


def arrays(blob: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """A block's tensors, read by the safetensors library."""
    return {name: np.frombuffer(entry["data"], np.uint32).reshape(entry["shape"]) for name, entry in deserialize(blob)}


def with_other_kv(header: archive_pb2.ArchiveBlock, blob: bytes) -> tuple[archive_pb2.ArchiveBlock, bytes]:
    """The block with the bits of every number turned, and a digest that fits: KV that no model made of the tokens."""
    n_header = 8 + int.from_bytes(blob[:8], "little")
    turned = np.frombuffer(blob[n_header:], "<f4") * np.float32(-3.0)
    blob = blob[:n_header] + turned.tobytes()
    header.kv_digest = xxh3_128(turned.tobytes()).hexdigest()
    return header, blob
