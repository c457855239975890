from __future__ import annotations

import numpy as np
import pytest
from storage_samples import all_values, assert_kv_equal, destinations, kv_arrays, overwrite

from sessiond import errors
from sessiond.storage import envelope, keys, kv
from sessiond.storage.codec import Blosc2ShuffleZstd, ExponentPlanes, Raw
from sessiond.storage.kv import KVOwner, encode_kv, kv_digest
from sessiond.types import Part

CELL = KVOwner("t", "cell", bytes(range(16)))
TAIL = KVOwner("t", "tail", b"r1", 3)


def store(blocks, owner=CELL, start=0, arrays=None, **options):
    arrays = kv_arrays() if arrays is None else arrays
    encoded = encode_kv(owner, start, arrays, **{"codec": Blosc2ShuffleZstd(), **options})
    blocks.write(encoded.records).result()
    return encoded


@pytest.mark.parametrize("layout", ["token", "channel"])
@pytest.mark.parametrize("codec", [Raw, Blosc2ShuffleZstd])
@pytest.mark.parametrize("n", [1, 63, 128, 129, 300])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_kv_round_trips_whatever_codec_layout_and_length(blocks, layout, codec, n, dtype):
    arrays = kv_arrays(n=n, D=24, dtype=dtype)
    encoded = store(blocks, TAIL, 128, arrays, codec=codec(layout=layout))
    buffers, out = destinations(n=n, D=24, dtype=dtype)
    assert blocks.read_into(TAIL, 128, n, 3, out) == encoded.coded_bytes
    assert_kv_equal(buffers, arrays)
    assert encoded.raw_bytes == sum(a.nbytes for pair in arrays for a in pair)
    assert len(encoded.records) == 2 * -(-n // 128)


def test_sources_and_destinations_may_have_any_strides(blocks):
    whole = kv_arrays(n=200, D=32)
    arrays = [(k[:, 50:113], v[:, 113:50:-1]) for k, v in whole]
    for i, codec in enumerate([Blosc2ShuffleZstd(), Blosc2ShuffleZstd(layout="channel"), ExponentPlanes()]):
        owner = KVOwner("t", "cell", bytes([i] * 16))
        encoded = store(blocks, owner, 0, arrays, codec=codec)
        assert encoded.kv_digest == kv_digest([(k.copy(), v.copy()) for k, v in arrays])
        # K lands in a channel-major buffer, V inside a longer one; canaries must survive.
        k_store = np.full((3, 2, 32, 100), 9, np.uint16)
        v_store = np.full((3, 2, 400, 32), 9, np.uint16)
        views = {}
        for layer in range(3):
            views[layer, Part.K] = k_store[layer].transpose(0, 2, 1)[:, 20:83]
            views[layer, Part.V] = v_store[layer][:, 100:163]
        blocks.read_into(owner, 0, 63, 3, lambda layer, part, views=views: views[layer, part])
        assert_kv_equal(views, arrays)
        assert (k_store[..., :20] == 9).all()
        assert (k_store[..., 83:] == 9).all()
        assert (v_store[:, :, :100] == 9).all()
        assert (v_store[:, :, 163:] == 9).all()


def test_a_tail_may_be_coded_in_several_calls(blocks):
    """A short last run would fit more layers into a record than the others: readers expect the same everywhere."""
    arrays = kv_arrays(n=2 * 128 + 20, n_layers=12, D=128, dtype=np.uint32)
    for start in (0, 128, 256):
        cut = [(k[:, start : start + 128], v[:, start : start + 128]) for k, v in arrays]
        store(blocks, TAIL, start, cut, part_of_more=True)
    buffers, out = destinations(n=276, n_layers=12, D=128, dtype=np.uint32)
    blocks.read_into(TAIL, 0, 276, 12, out)
    assert_kv_equal(buffers, arrays)
    assert blocks.shape(TAIL, 256) == (12, 2, 128, 4)
    with pytest.raises(errors.RecordCorrupt):
        blocks.shape(TAIL, 1)


def test_layers_of_different_shapes_get_their_own_records(blocks):
    arrays = kv_arrays(2) + kv_arrays(1, G=4, D=8) + kv_arrays(1)
    encoded = store(blocks, arrays=arrays)
    assert len(encoded.records) == 6
    buffers = {(i, part): np.zeros_like(arrays[i][part]) for i in range(4) for part in (Part.K, Part.V)}
    blocks.read_into(CELL, 0, 63, 4, lambda layer, part: buffers[layer, part])
    assert_kv_equal(buffers, arrays)


@pytest.mark.parametrize("codec", [ExponentPlanes(), Blosc2ShuffleZstd()])
def test_records_of_the_default_model_are_256_kib_to_1_mib(codec):
    arrays = kv_arrays(30, G=3, n=128, D=64)
    encoded = encode_kv(CELL, 0, arrays, codec=codec)
    assert len(encoded.records) == 4
    assert all(256 << 10 <= len(value) <= 1 << 20 for _, value in encoded.records)
    on_disk = sum(-(-(len(value) + 16) // 4096) * 4096 for _, value in encoded.records)
    assert on_disk < encoded.raw_bytes


@pytest.mark.parametrize("codec", [ExponentPlanes(), Blosc2ShuffleZstd()])
def test_encoding_is_pure(codec):
    assert encode_kv(CELL, 0, kv_arrays(), codec=codec) == encode_kv(CELL, 0, kv_arrays(), codec=codec)


def test_the_digest_sees_every_change():
    arrays = kv_arrays()
    digest = kv_digest(arrays)
    for layer, part in ((0, 0), (2, 1)):
        changed = [(k.copy(), v.copy()) for k, v in arrays]
        changed[layer][part][1, 62, 15] ^= 1
        assert kv_digest(changed) != digest
    assert kv_digest([(v, k) for k, v in arrays]) != digest
    assert kv_digest(arrays[::-1]) != digest


@pytest.mark.parametrize("codec", [Raw(), Blosc2ShuffleZstd(), ExponentPlanes()])
def test_damage_anywhere_in_any_record_is_found_and_named(blocks, block_env, codec):
    arrays = kv_arrays(2, n=9)
    store(blocks, CELL, 0, arrays, codec=codec)
    buffers, out = destinations(2, n=9)
    for key, value in all_values(block_env).items():
        head = envelope.HEAD_BYTES + 300
        for position in [
            *range(0, head, 7),
            *range(head, len(value), max(1, len(value) // 40)),
            len(value) - 1,
        ]:
            damaged = bytearray(value)
            damaged[position] ^= 4
            overwrite(block_env, key, bytes(damaged))
            with pytest.raises(errors.RecordCorrupt) as caught:
                blocks.read_into(CELL, 0, 9, 2, out)
            assert caught.value.metadata["key"] == keys.readable(key)
        for damaged in (None, b"", value[:-1], value[: len(value) // 2], bytes(len(value))):
            overwrite(block_env, key, damaged)
            with pytest.raises(errors.RecordCorrupt):
                blocks.read_into(CELL, 0, 9, 2, out)
        overwrite(block_env, key, value)
    blocks.read_into(CELL, 0, 9, 2, out)
    assert_kv_equal(buffers, arrays)


def test_without_the_frame_checksum_a_flip_is_silent(blocks, block_env, monkeypatch):
    arrays = kv_arrays(2, n=9)
    store(blocks, CELL, 0, arrays, codec=Raw())
    key, value = next(iter(all_values(block_env).items()))
    overwrite(block_env, key, value[:-1] + bytes([value[-1] ^ 1]))
    monkeypatch.setattr(kv, "_authentic", lambda *_: True)
    buffers, out = destinations(2, n=9)
    blocks.read_into(CELL, 0, 9, 2, out)
    with pytest.raises(AssertionError):
        assert_kv_equal(buffers, arrays)


@pytest.mark.parametrize(
    "thief",
    [
        KVOwner("u", "cell", bytes(range(16))),
        KVOwner("t", "cell", bytes(16)),
        KVOwner("t", "tail", b"r1", 4),
        KVOwner("t", "tail", b"r2", 3),
    ],
)
def test_records_copied_under_another_owner_are_refused(blocks, block_env, thief):
    owner = CELL if thief.kind == "cell" else TAIL
    store(blocks, owner)
    for key, value in all_values(block_env).items():
        overwrite(block_env, thief.prefix + key[len(owner.prefix) :], value)
    _, out = destinations()
    blocks.read_into(owner, 0, 63, 3, out)
    with pytest.raises(errors.RecordCorrupt, match="checksum"):
        blocks.read_into(thief, 0, 63, 3, out)


def test_records_swapped_within_one_owner_are_refused(blocks, block_env):
    store(blocks, arrays=kv_arrays(n=256))
    found = list(all_values(block_env).items())
    overwrite(block_env, found[0][0], found[1][1])
    overwrite(block_env, found[1][0], found[0][1])
    _, out = destinations(n=256)
    with pytest.raises(errors.RecordCorrupt):
        blocks.read_into(CELL, 0, 256, 3, out)


def test_frames_swapped_within_one_record_are_refused(blocks, block_env):
    store(blocks, codec=Raw())
    key, value = next(iter(all_values(block_env).items()))
    size = 2 * 63 * 16 * 2
    at = len(value) - 3 * size
    swapped = value[:at] + value[at + size : at + 2 * size] + value[at : at + size] + value[at + 2 * size :]
    overwrite(block_env, key, swapped)
    _, out = destinations()
    with pytest.raises(errors.RecordCorrupt, match="layer 0"):
        blocks.read_into(CELL, 0, 63, 3, out)


def test_asking_for_another_span_shape_or_depth_is_refused(blocks):
    store(blocks)
    asked = [
        (1, 63, 3, {}), (0, 62, 3, {}), (0, 64, 3, {}), (0, 63, 2, {}), (0, 63, 4, {}),
        (0, 63, 3, {"D": 17}), (0, 63, 3, {"G": 1}), (0, 63, 3, {"dtype": np.uint32}),
    ]  # fmt: skip
    for start, n, layers, shape in asked:
        _, out = destinations(max(layers, 3), **({"n": n} | shape))
        with pytest.raises(errors.RecordCorrupt):
            blocks.read_into(CELL, start, n, layers, out)


def test_a_prefix_of_whole_runs_can_be_read(blocks):
    arrays = kv_arrays(n=300)
    store(blocks, TAIL, 0, arrays)
    buffers, out = destinations(n=256)
    blocks.read_into(TAIL, 0, 256, 3, out)
    assert_kv_equal(buffers, [(k[:, :256], v[:, :256]) for k, v in arrays])


def test_delete_takes_one_owner_only(blocks):
    others = [KVOwner("t", "tail", b"r1", 2), KVOwner("t", "tail", b"r11", 3), KVOwner("u", "tail", b"r1", 3)]
    for owner in (CELL, TAIL, *others):
        store(blocks, owner)
    assert set(blocks.owners()) == {CELL, TAIL, *others}
    assert set(blocks.owners("u")) == {others[2]}
    assert list(blocks.owners("none")) == []
    blocks.delete(TAIL).result()
    assert set(blocks.owners()) == {CELL, *others}
    _, out = destinations()
    with pytest.raises(errors.RecordCorrupt, match="missing"):
        blocks.read_into(TAIL, 0, 63, 3, out)
    blocks.read_into(others[1], 0, 63, 3, out)


def test_large_writes_are_cut_into_transactions_and_resolve_once(blocks):
    records = [(keys.kv_key(TAIL.prefix, 128 * i, Part.K, 0), bytes(1 << 20)) for i in range(20)]
    before = blocks.stat()
    blocks.write(records).result()
    assert blocks.stat().entries - before.entries == 20
    assert blocks.stat().commits - before.commits >= 3
    blocks.write([]).result()


def test_freed_space_is_used_again(blocks):
    arrays = kv_arrays(8, n=128, D=64)
    store(blocks, arrays=arrays)
    store(blocks, TAIL, arrays=arrays)
    size = blocks.stat().file_bytes
    for generation in range(10):
        blocks.delete(TAIL if generation == 0 else KVOwner("t", "tail", b"r1", 100 + generation - 1)).result()
        store(blocks, KVOwner("t", "tail", b"r1", 100 + generation), arrays=arrays)
    assert blocks.stat().file_bytes < 2 * size
