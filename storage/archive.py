"""The container of a portable archive: a manifest, blocks, and a hash over all of it (docs/format.md, "Archives").

Manifest and block headers are opaque bytes here. Neither side holds more than one block in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3

from sessiond import errors
from sessiond.storage.incoming import Incoming

MAGIC = b"SnsdArch"
VERSION = 1
HASH_BYTES = 32
MAX_MANIFEST_BYTES = 64 << 20
MAX_HEADER_BYTES = 4096
MAX_BLOB_BYTES = 256 << 20

_HEAD = struct.Struct("<8sIIQ")  # magic, version, zero, manifest length
_FRAME = struct.Struct("<IIQ")  # header length, zero, blob length
_END = bytes(_FRAME.size)
_READ_BYTES = 1 << 20


class ArchiveWriter:
    """Makes an archive's bytes, piece by piece: `begin`, any number of `block`, `end`. Join what they return."""

    def __init__(self) -> None:
        self._hash = blake3()

    def begin(self, manifest: bytes) -> bytes:
        """Raises BadRequest if the manifest is larger than any reader would accept."""
        if len(manifest) > MAX_MANIFEST_BYTES:
            raise errors.BadRequest(f"the history takes {len(manifest)} bytes; an archive holds {MAX_MANIFEST_BYTES}")
        return self._hashed(_HEAD.pack(MAGIC, VERSION, 0, len(manifest)) + manifest)

    def block(self, header: bytes, blob: bytes) -> bytes:
        assert 1 <= len(header) <= MAX_HEADER_BYTES, len(header)
        assert len(blob) <= MAX_BLOB_BYTES, len(blob)
        return self._hashed(_FRAME.pack(len(header), 0, len(blob)) + header + blob)

    def end(self) -> bytes:
        return self._hashed(_END) + self._hash.digest(HASH_BYTES)

    def _hashed(self, data: bytes) -> bytes:
        self._hash.update(data)
        return data


@dataclass(frozen=True, slots=True)
class Block:
    """Where a block lies: `header` is read, the blob [offset, offset + length) of the file is not."""

    header: bytes
    offset: int
    length: int


class ArchiveReader:
    """An archive in a file. Nothing is parsed before the hash over the whole file has verified."""

    def __init__(self, file: Incoming) -> None:
        """Raises BadRequest (no archive), RecordCorrupt (cut or damaged) or FormatTooNew."""
        self.file = file
        self._end = file.size - HASH_BYTES
        if file.read_at(0, min(len(MAGIC), file.size)) != MAGIC:
            raise errors.BadRequest("this is no archive of a session: it does not begin as one")
        if self._end < _HEAD.size + len(_END):
            raise corrupt("it is cut off")
        self.digest = self._verify()
        _, version, zero, length = _HEAD.unpack(file.read_at(0, _HEAD.size))
        if version > VERSION:
            raise errors.FormatTooNew(
                f"the archive has format {version}; this version reads up to {VERSION}",
                format=version,
                supported=VERSION,
            )
        if version < 1 or zero or length > min(MAX_MANIFEST_BYTES, self._end - _HEAD.size - len(_END)):
            raise malformed(f"a manifest of {length} bytes in version {version}")
        self.manifest = file.read_at(_HEAD.size, length)
        self._blocks_at = _HEAD.size + length

    def blocks(self) -> Iterator[Block]:
        """The blocks in their order. Raises BadRequest where a length does not fit, or something follows the last."""
        at = self._blocks_at
        while True:
            if at + _FRAME.size > self._end:
                raise malformed("its blocks have no end")
            n_header, zero, n_blob = _FRAME.unpack(self.file.read_at(at, _FRAME.size))
            at += _FRAME.size
            if (n_header, zero, n_blob) == (0, 0, 0):
                break
            left = self._end - at
            if not 1 <= n_header <= MAX_HEADER_BYTES or zero or n_blob > MAX_BLOB_BYTES or n_header + n_blob > left:
                raise malformed(f"a block of {n_header} and {n_blob} bytes where {left} are left")
            yield Block(self.file.read_at(at, n_header), at + n_header, n_blob)
            at += n_header + n_blob
        if at != self._end:
            raise malformed(f"{self._end - at} bytes follow its end")

    def _verify(self) -> bytes:
        state = blake3()
        for at in range(0, self._end, _READ_BYTES):
            state.update(self.file.read_at(at, min(_READ_BYTES, self._end - at)))
        told = self.file.read_at(self._end, HASH_BYTES)
        if state.digest(HASH_BYTES) != told:
            raise corrupt("its hash does not match its bytes")
        return told


def malformed(why: str) -> errors.BadRequest:
    """An archive that arrived as it was written, and was written wrong."""
    return errors.BadRequest(f"malformed archive: {why}", field="archive")


def corrupt(why: str) -> errors.RecordCorrupt:
    """An archive that is not as it was written."""
    return errors.RecordCorrupt(f"the archive is damaged: {why}; fetch it again", key="archive")
