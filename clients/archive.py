"""An archive as a stream of parts, both ways. No input or output of its own: both clients use it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from sessiond.clients.errors import DataLossError, ProtocolError
from sessiond.v1 import sessions_pb2

CHUNK_BYTES = 1 << 20


class ArchiveReader:
    """Checks an export's order, length and hash."""

    def __init__(self) -> None:
        self.header: sessions_pb2.ArchiveHeader | None = None
        self._sha256 = hashlib.sha256()
        self._n_bytes = 0
        self._done = False

    def receive(self, message: sessions_pb2.ExportSessionResponse) -> bytes:
        """The archive bytes in `message`, b"" if none. Raises DataLossError if the trailer disagrees."""
        part = message.WhichOneof("part")
        if self._done or (self.header is None) is not (part == "header"):
            raise ProtocolError(f"the archive's parts are out of order at {part}")
        if part == "header":
            self.header = message.header
        elif part == "trailer":
            self._check(message.trailer)
            self._done = True
        self._sha256.update(message.chunk)
        self._n_bytes += len(message.chunk)
        return message.chunk

    def end_of_stream(self) -> None:
        """Raises DataLossError if there was no trailer."""
        if not self._done:
            raise DataLossError("the archive ended before its trailer")

    def _check(self, trailer: sessions_pb2.ArchiveTrailer) -> None:
        if (trailer.total_bytes, trailer.sha256) != (self._n_bytes, self._sha256.digest()):
            raise DataLossError("the archive's hash does not match its bytes")


class ArchiveWriter:
    """Makes an import's parts of the archive's bytes, in pieces of any size."""

    def __init__(self, header: sessions_pb2.ImportHeader) -> None:
        self._header = header
        self._sha256 = hashlib.sha256()
        self._n_bytes = 0

    def start(self) -> sessions_pb2.ImportSessionRequest:
        return sessions_pb2.ImportSessionRequest(header=self._header)

    def chunks(self, data: bytes) -> Iterator[sessions_pb2.ImportSessionRequest]:
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            self._sha256.update(chunk)
            self._n_bytes += len(chunk)
            yield sessions_pb2.ImportSessionRequest(chunk=chunk)

    def finish(self) -> sessions_pb2.ImportSessionRequest:
        trailer = sessions_pb2.ArchiveTrailer(sha256=self._sha256.digest(), total_bytes=self._n_bytes)
        return sessions_pb2.ImportSessionRequest(trailer=trailer)
