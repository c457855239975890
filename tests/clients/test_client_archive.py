"""Archives are checked on the way out and closed on the way in."""

import pytest

from sessiond.clients import DataLossError, ProtocolError
from sessiond.clients.archive import CHUNK_BYTES, ArchiveReader, ArchiveWriter
from sessiond.v1 import sessions_pb2


def export(data: bytes) -> list[sessions_pb2.ExportSessionResponse]:
    writer = ArchiveWriter(sessions_pb2.ImportHeader())
    chunks = [sessions_pb2.ExportSessionResponse(chunk=part.chunk) for part in writer.chunks(data)]
    header = sessions_pb2.ExportSessionResponse(header=sessions_pb2.ArchiveHeader(format=1))
    trailer = sessions_pb2.ExportSessionResponse(trailer=writer.finish().trailer)
    return [header, *chunks, trailer]


def read(parts: list[sessions_pb2.ExportSessionResponse]) -> bytes:
    reader = ArchiveReader()
    data = b"".join(reader.receive(part) for part in parts)
    reader.end_of_stream()
    return data


def test_an_archive_round_trips_in_chunks() -> None:
    data = bytes(range(256)) * 5000
    parts = export(data)
    assert [len(part.chunk) for part in parts] == [0, CHUNK_BYTES, len(data) - CHUNK_BYTES, 0]
    assert read(parts) == data


def test_damage_and_truncation_are_noticed() -> None:
    header, chunk, trailer = export(b"state")
    with pytest.raises(DataLossError):
        read([header, sessions_pb2.ExportSessionResponse(chunk=b"statf"), trailer])
    with pytest.raises(DataLossError):
        read([header, trailer])
    with pytest.raises(DataLossError):
        read([header, chunk])


def test_parts_out_of_order_are_refused() -> None:
    header, chunk, trailer = export(b"state")
    for parts in ([chunk, header, trailer], [header, header], [header, chunk, trailer, chunk]):
        with pytest.raises(ProtocolError):
            read(parts)
