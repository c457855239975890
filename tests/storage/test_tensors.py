"""KV as safetensors: the library reads what we write, and our reader takes nothing that differs."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save

from sessiond.storage.kv import LayerArrays, kv_digest
from sessiond.storage.tensors import decode_tensors, encode_tensors, tensor_bytes
from sessiond.types import KVShape, Part

SHAPES = [KVShape(3, 2, 8, "bfloat16"), KVShape(1, 1, 63, "float16"), KVShape(12, 3, 5, "float32")]


def some(shape: KVShape, n: int) -> LayerArrays:
    rng = np.random.default_rng(n)
    dims = (shape.n_kv_heads, n, shape.head_dim)
    top = 1 << 8 * shape.itemsize
    dtype = np.dtype(f"<u{shape.itemsize}")
    return [
        (rng.integers(0, top, dims, np.uint64).astype(dtype), rng.integers(0, top, dims, np.uint64).astype(dtype))
        for _ in range(shape.n_layers)
    ]


@pytest.mark.parametrize("n", [1, 63, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestEveryShape:
    def test_comes_back_bit_for_bit(self, shape: KVShape, n: int) -> None:
        arrays = some(shape, n)
        back = decode_tensors(encode_tensors(arrays, shape.dtype), shape, n)
        assert kv_digest(back) == kv_digest(arrays)
        assert all(array.shape == (shape.n_kv_heads, n, shape.head_dim) for pair in back for array in pair)

    def test_is_read_by_the_library(self, shape: KVShape, n: int) -> None:
        arrays = some(shape, n)
        found = dict(deserialize(encode_tensors(arrays, shape.dtype)))
        assert len(found) == 2 * shape.n_layers
        for layer, pair in enumerate(arrays):
            for part, array in zip("kv", pair, strict=True):
                entry = found[f"layers.{layer}.{part}"]
                assert entry["shape"] == list(array.shape)
                assert bytes(entry["data"]) == array.tobytes()

    def test_has_its_heads_where_they_are_looked_for(self, shape: KVShape, n: int) -> None:
        arrays = some(shape, n)
        blob = encode_tensors(arrays, shape.dtype)
        for layer in range(shape.n_layers):
            for part in (Part.K, Part.V):
                for head in range(shape.n_kv_heads):
                    offset, length = tensor_bytes(blob[:8], shape, n, layer, part, head)
                    assert blob[offset : offset + length] == arrays[layer][part][head].tobytes()


def test_strided_arrays_are_written_in_order() -> None:
    shape = SHAPES[0]
    arrays = some(shape, 64)
    cut = [(k[:, 10:40], v[:, 10:40]) for k, v in arrays]
    assert kv_digest(decode_tensors(encode_tensors(cut, shape.dtype), shape, 30)) == kv_digest(cut)


@pytest.mark.parametrize(
    "other",
    [KVShape(2, 2, 8), KVShape(4, 2, 8), KVShape(3, 1, 8), KVShape(3, 2, 4), KVShape(3, 2, 8, "float16")],
    ids=str,
)
def test_another_models_kv_is_refused(other: KVShape) -> None:
    blob = encode_tensors(some(SHAPES[0], 16), "bfloat16")
    with pytest.raises(ValueError, match="tensor"):
        decode_tensors(blob, other, 16)
    with pytest.raises(ValueError, match="tensor"):
        decode_tensors(blob, SHAPES[0], 15)


def test_what_the_library_writes_in_another_order_is_refused_by_its_offsets() -> None:
    """`save` sorts names: layers.10 comes before layers.2. Layout is part of the format."""
    shape = SHAPES[2]
    tensors = {
        f"layers.{layer}.{part}": array.view(np.float32)
        for layer, pair in enumerate(some(shape, 4))
        for part, array in zip("kv", pair, strict=True)
    }
    with pytest.raises(ValueError, match=r"layers\.2\.k"):
        decode_tensors(save(tensors), shape, 4)
