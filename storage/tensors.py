"""Keys and values of one run of positions as a safetensors file, and a strict reader of its header.

Tensors "layers.<i>.k" and "layers.<i>.v", each [G, n, D], in the order of layers, K before V. The header is JSON;
nothing in it is believed before it was compared with what this model's KV must look like.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessiond.storage.envelope import canonical_json
from sessiond.storage.kv import LayerArrays
from sessiond.types import KVShape, Part

MAX_HEADER_BYTES = 4 << 20
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_LENGTH = struct.Struct("<Q")
_ALIGN = 8


def encode_tensors(arrays: LayerArrays, dtype: str) -> bytes:
    """The file of these layers: K and V, each [G, n, D], bit patterns of `dtype`."""
    header: dict[str, Any] = {}
    at = 0
    for layer, pair in enumerate(arrays):
        for part, array in zip("kv", pair, strict=True):
            offsets = [at, at + array.nbytes]
            header[f"layers.{layer}.{part}"] = {
                "data_offsets": offsets, "dtype": _NAMES[dtype], "shape": list(array.shape),
            }  # fmt: skip
            at += array.nbytes
    raw = canonical_json(header)
    raw += b" " * (-len(raw) % _ALIGN)
    return b"".join([_LENGTH.pack(len(raw)), raw, *(np.ascontiguousarray(a).tobytes() for p in arrays for a in p)])


def decode_tensors(blob: bytes, shape: KVShape, n_tokens: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """K and V of each layer, [G, n_tokens, D] unsigned, as views of `blob`.

    Raises ValueError saying what differs from the KV of `n_tokens` positions of a model of that `shape`.
    """
    n_header = _LENGTH.unpack_from(blob)[0] if len(blob) >= _LENGTH.size else -1
    data = _LENGTH.size + n_header
    if not 2 <= n_header <= MAX_HEADER_BYTES or data > len(blob):
        raise ValueError(f"a tensor header of {n_header} bytes in a block of {len(blob)}")
    header = _parse(blob[_LENGTH.size : data])
    wanted = [shape.n_kv_heads, n_tokens, shape.head_dim]
    n_bytes = n_tokens * shape.layer_bytes_per_token
    unsigned = np.dtype(f"<u{shape.itemsize}")
    out: list[NDArray[Any]] = []
    names = list(_expected(shape.n_layers))
    if set(header) != set(names):
        raise ValueError(f"{len(header)} tensors, not K and V of {shape.n_layers} layers")
    for at, name in enumerate(names):
        entry = header[name]
        said = {"dtype": _NAMES[shape.dtype], "shape": wanted, "data_offsets": [at * n_bytes, (at + 1) * n_bytes]}
        if entry != said:
            raise ValueError(f"tensor {name} is {_short(entry)}, not {_short(said)}")
        out.append(np.frombuffer(blob, unsigned, n_bytes // shape.itemsize, data + at * n_bytes).reshape(wanted))
    if data + len(names) * n_bytes != len(blob):
        raise ValueError(f"{len(blob)} bytes, not the {data + len(names) * n_bytes} that its header describes")
    return [(out[i], out[i + 1]) for i in range(0, len(out), 2)]


def tensor_bytes(header_of: bytes, shape: KVShape, n_tokens: int, layer: int, part: Part, head: int) -> tuple[int, int]:
    """Offset and length, in a block that `decode_tensors` accepted, of one head's [n_tokens, D]. `header_of`: its
    first 8 bytes."""
    row = n_tokens * shape.head_dim * shape.itemsize
    which = (2 * layer + int(part)) * shape.n_kv_heads + head
    return _LENGTH.size + int(_LENGTH.unpack(header_of)[0]) + which * row, row


def _expected(n_layers: int) -> Iterator[str]:
    for layer in range(n_layers):
        yield f"layers.{layer}.k"
        yield f"layers.{layer}.v"


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unrepeated)
    except RecursionError as exc:
        raise ValueError("its tensor header is nested too deeply") from exc
    if not isinstance(header, dict):
        raise ValueError("its tensor header is no JSON object")
    header.pop("__metadata__", None)
    return header


def _unrepeated(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("its tensor header repeats a name")
    return out


def _short(value: object) -> str:
    return repr(value)[:120]
