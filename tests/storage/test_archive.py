"""The container: what is written is read, whatever else is refused before it is allocated or parsed."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from sessiond.errors import BadRequest, FormatTooNew, RecordCorrupt
from sessiond.storage.archive import MAX_MANIFEST_BYTES, ArchiveReader, ArchiveWriter
from sessiond.storage.incoming import Incoming

BLOCKS = [(b"header one", b"blob" * 100), (b"h", b""), (b"x" * 4096, b"\0" * 5000)]


def written(manifest: bytes = b"manifest", blocks: list[tuple[bytes, bytes]] = BLOCKS) -> bytes:
    writer = ArchiveWriter()
    return b"".join([writer.begin(manifest), *(writer.block(*block) for block in blocks), writer.end()])


@contextlib.contextmanager
def opened(folder: Path, content: bytes) -> Iterator[ArchiveReader]:
    with Incoming(folder, 0) as file:
        file.append(content)
        yield ArchiveReader(file)


def refuse(folder: Path, content: bytes, *errors: type[Exception]) -> None:
    with pytest.raises(errors), opened(folder, content):
        pass


def read(reader: ArchiveReader) -> list[tuple[bytes, bytes]]:
    return [(block.header, reader.file.read_at(block.offset, block.length)) for block in reader.blocks()]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with opened(tmp_path, written()) as reader:
        assert reader.manifest == b"manifest"
        assert read(reader) == BLOCKS
    with opened(tmp_path, written(b"", [])) as reader:
        assert read(reader) == []


def test_its_bytes_are_as_the_format_says(tmp_path: Path) -> None:
    content = b"SnsdArch" + struct.pack("<IIQ", 1, 0, 2) + b"mm" + struct.pack("<IIQ", 1, 0, 3) + b"hbbb" + bytes(16)
    assert written(b"mm", [(b"h", b"bbb")]) == content + blake3(content).digest()
    with opened(tmp_path, written()) as reader:
        assert reader.digest == written()[-32:]


def test_every_bit_counts(tmp_path: Path) -> None:
    whole = written(b"m", [(b"h", b"b")])
    for bit in range(8 * len(whole)):
        bad = bytearray(whole)
        bad[bit // 8] ^= 1 << bit % 8
        refuse(tmp_path, bytes(bad), RecordCorrupt, BadRequest)


def test_every_length_but_its_own_is_refused(tmp_path: Path) -> None:
    whole = written(b"m", [(b"h", b"b")])
    for length in range(len(whole)):
        refuse(tmp_path, whole[:length], RecordCorrupt, BadRequest)


def test_a_newer_version_is_known_by_its_hash_first(tmp_path: Path) -> None:
    content = bytearray(written()[:-32])
    content[8] = 9
    refuse(tmp_path, bytes(content) + blake3(content).digest(), FormatTooNew)
    refuse(tmp_path, bytes(content) + written()[-32:], RecordCorrupt)


def test_a_manifest_that_no_reader_takes_is_not_written() -> None:
    with pytest.raises(BadRequest):
        ArchiveWriter().begin(bytes(MAX_MANIFEST_BYTES + 1))


def test_reading_holds_one_block_at_a_time(tmp_path: Path) -> None:
    n_blocks, n_bytes = 24, 1 << 20
    writer = ArchiveWriter()
    with Incoming(tmp_path, 0) as file:
        file.append(writer.begin(b""))
        for _ in range(n_blocks):
            file.append(writer.block(b"h", bytes(n_bytes)))
        file.append(writer.end())
        tracemalloc.start()
        try:
            reader = ArchiveReader(file)
            assert sum(len(file.read_at(block.offset, block.length)) for block in reader.blocks()) == n_blocks * n_bytes
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4 * n_bytes
