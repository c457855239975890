"""KV records: exact keys and values of one span, cut into frames that are coded and checked one by one.

Arrays are bit patterns: unsigned integers as wide as the model's elements (bf16 -> uint16).
docs/format.md, "KV records".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128, xxh3_128_digest

from sessiond.storage import envelope, keys
from sessiond.storage.codec import AnyCodec, codec_config, codec_from_config
from sessiond.types import Part

SPAN_TOKENS = 128
MAX_RECORD_RAW_BYTES = 896 << 10  # 0.6 coded: two records of 15 layers for the default model

_ENTRY = struct.Struct("<II16s")  # offset in the payload, length, checksum

LayerArrays = Sequence[tuple[NDArray[Any], NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class KVOwner:
    """Whose KV it is: a sealed cell (`id` = its prefix hash) or a tail (`id` = its revision id, UTF-8).

    Equal owners never hold different bytes: a tail that changes takes a new generation.
    """

    tenant: str
    kind: Literal["cell", "tail"]
    id: bytes
    generation: int = 0

    @property
    def prefix(self) -> bytes:
        """Start of the keys of all its records. Raises BadRequest on ids out of range."""
        kind = keys.KV_CELL if self.kind == "cell" else keys.KV_TAIL
        return keys.kv_owner_prefix(self.tenant, kind, self.id, self.generation)

    @property
    def every_generation(self) -> bytes:
        """Start of the keys of all records of this and any other generation."""
        return self.prefix[:-8]

    @property
    def name(self) -> bytes:
        """What a writer holds in `InFlight`: one name for all generations of a tail."""
        return self.every_generation


@dataclass(frozen=True, slots=True)
class EncodedKV:
    """Records ready for BlockStore.write. `coded_bytes` counts whole records, headers included."""

    records: list[tuple[bytes, bytes]]
    raw_bytes: int
    coded_bytes: int
    kv_digest: str


@dataclass(frozen=True, slots=True)
class KVRecord:
    """A verified KV record; frames are still coded and are checked one by one in `decode`."""

    key: bytes
    codec: AnyCodec
    start: int
    part: Part
    first_layer: int
    n_layers: int
    shape: tuple[int, int, int]  # G, n, D
    itemsize: int
    table: memoryview
    payload: memoryview

    def check_frames(self) -> None:
        """Check every frame's checksum without decoding it. Raises RecordCorrupt."""
        for i, (offset, length, digest) in enumerate(_ENTRY.iter_unpack(self.table)):
            if not _authentic(self.payload[offset : offset + length], digest):
                raise envelope.corrupt(self.key, f"checksum mismatch in layer {self.first_layer + i}")

    def decode(self, layer: int, out: NDArray[Any], scratch: NDArray[np.uint8]) -> None:
        """Check and decode `layer` into `out` [G, n, D], through `scratch` if `out` is strided.

        Raises RecordCorrupt; `out` may then hold anything.
        """
        offset, length, digest = _ENTRY.unpack_from(self.table, (layer - self.first_layer) * _ENTRY.size)
        coded = self.payload[offset : offset + length]
        if not _authentic(coded, digest):
            raise envelope.corrupt(self.key, f"checksum mismatch in layer {layer}")
        target = out if self.codec.layout == "token" else out.transpose(0, 2, 1)
        try:
            if self.codec.strided or target.flags.c_contiguous:
                self.codec.decode(coded, target)
            else:
                frame = scratch[: target.nbytes].view(target.dtype).reshape(target.shape)
                self.codec.decode(coded, frame)
                np.copyto(target, frame)
        except ValueError as exc:
            raise envelope.corrupt(self.key, f"layer {layer}: {exc}") from exc


def encode_kv(
    owner: KVOwner,
    start: int,
    arrays: LayerArrays,
    *,
    codec: AnyCodec,
    span_tokens: int = SPAN_TOKENS,
    part_of_more: bool = False,
) -> EncodedKV:
    """Code the span [start, start + n): for each layer K and V, each [G, n, D], any strides, n >= 1.

    `part_of_more`: a longer span is coded in several calls, each but the last of whole runs; layers are then grouped
    alike in all of them, as readers expect of one owner.
    Thread-safe, mostly without the GIL. Pure: equal input gives equal records.
    """
    assert start >= 0, start
    n_tokens = arrays[0][0].shape[1]
    prefix = owner.prefix
    records: list[tuple[bytes, bytes]] = []
    for part in (Part.K, Part.V):
        layers = [pair[part] for pair in arrays]
        assert all(a.shape[1] == n_tokens and a.dtype.kind == "u" for a in layers), "one length, unsigned views"
        for first, count in _layer_groups(layers, span_tokens if part_of_more else min(n_tokens, span_tokens)):
            for at in range(0, n_tokens, span_tokens):
                group = [a[:, at : at + span_tokens] for a in layers[first : first + count]]
                key = keys.kv_key(prefix, start + at, part, first)
                records.append((key, _encode_record(key, codec, start + at, part, first, group)))
    return EncodedKV(
        records=records,
        raw_bytes=sum(k.nbytes + v.nbytes for k, v in arrays),
        coded_bytes=sum(len(value) for _, value in records),
        kv_digest=kv_digest(arrays),
    )


def kv_digest(arrays: LayerArrays) -> str:
    """XXH3-128 (hex) over each layer's K then V, [G, n, D] in C order: equal exactly when the KV is."""
    state = xxh3_128()
    for pair in arrays:
        for array in pair:
            state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return str(state.hexdigest())


def open_record(key: bytes, value: memoryview) -> KVRecord:
    """Verify a stored record's envelope and table. Frames are checked when they are decoded.

    Raises RecordCorrupt or FormatTooNew. The result aliases `value`.
    """
    record = envelope.unpack(key, value)
    header = record.header
    try:
        first, n_layers = header["layers"]
        g, n, d = header["shape"]
        parsed = KVRecord(
            key, codec_from_config(header["codec"]), header["start"], Part(header["part"]),
            first, n_layers, (g, n, d), header["dtype"], record.body, record.payload,
        )  # fmt: skip
        if len(record.body) != n_layers * _ENTRY.size or min(g, n, d, n_layers, parsed.itemsize) < 1:
            raise ValueError("table does not fit the header")
        end = 0
        for offset, length, _ in _ENTRY.iter_unpack(record.body):
            if offset != end:
                raise ValueError("frames have gaps")
            end += length
        if end != len(record.payload):
            raise ValueError("frames do not fill the payload")
    except (KeyError, TypeError, ValueError) as exc:
        raise envelope.corrupt(key, f"bad KV header: {exc!r}") from exc
    return parsed


def _authentic(coded: memoryview, digest: bytes) -> bool:
    return xxh3_128_digest(coded) == digest


def _encode_record(key: bytes, codec: AnyCodec, start: int, part: Part, first: int, group: list[NDArray[Any]]) -> bytes:
    frames, table, offset = [], bytearray(), 0
    for array in group:
        frame = np.ascontiguousarray(array if codec.layout == "token" else array.transpose(0, 2, 1))
        coded = codec.encode(frame)
        table += _ENTRY.pack(offset, len(coded), xxh3_128_digest(coded))
        offset += len(coded)
        frames.append(coded)
    shape = group[0].shape
    header = {
        "codec": codec_config(codec),
        "dtype": group[0].itemsize,
        "heads": [0, shape[0]],
        "layers": [first, len(group)],
        "n": shape[1],
        "part": int(part),
        "raw": sum(array.nbytes for array in group),
        "shape": list(shape),
        "start": start,
    }
    return envelope.pack(key, header, table, tuple(frames))


def _layer_groups(layers: list[NDArray[Any]], n_tokens: int) -> Iterator[tuple[int, int]]:
    """(first, count): runs of equal shape, split evenly so that a record's raw bytes stay under the cap."""
    first = 0
    while first < len(layers):
        shape, itemsize = layers[first].shape, layers[first].itemsize
        end = first
        while end < len(layers) and (layers[end].shape, layers[end].itemsize) == (shape, itemsize):
            end += 1
        layer_bytes = max(1, shape[0] * n_tokens * shape[2] * itemsize)
        n_groups = -(-(end - first) // max(1, MAX_RECORD_RAW_BYTES // layer_bytes))
        while n_groups:
            count = -(-(end - first) // n_groups)
            yield first, count
            first += count
            n_groups -= 1
