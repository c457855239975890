from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from sessiond.storage.codec import (
    CODECS,
    Blosc2ShuffleZstd,
    ExponentPlanes,
    Raw,
    codec_config,
    codec_for,
    codec_from_config,
)

ALL = [Raw(), Raw("channel"), Blosc2ShuffleZstd(), Blosc2ShuffleZstd(clevel=5, typesize=4, layout="channel")]


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 128, 64), (2, 63, 17)])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_frames_round_trip(codec, shape, dtype):
    frame = np.random.default_rng(1).integers(0, 2**16, shape).astype(dtype)
    out = np.full_like(frame, 7)
    codec.decode(memoryview(codec.encode(frame)), out)
    np.testing.assert_array_equal(out, frame)


def test_bf16_is_written_as_exponent_planes_and_other_types_are_not():
    assert codec_for("bfloat16") == ExponentPlanes()
    assert codec_for("float16") == Blosc2ShuffleZstd(typesize=2)
    assert codec_for("float32") == Blosc2ShuffleZstd(typesize=4)
    with pytest.raises(ValueError, match="2 bytes"):
        ExponentPlanes().decode(memoryview(b""), np.zeros((1, 1, 8), np.uint32))


@pytest.mark.parametrize("codec", [*ALL, ExponentPlanes()])
def test_a_config_names_its_codec(codec):
    assert codec_from_config(json.loads(json.dumps(codec_config(codec)))) == codec


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"name": "zip", "layout": "token"},
        {"name": "raw"},
        {"name": "raw", "layout": "odd"},
        {"name": "exponent-planes", "layout": "channel"},
        {"name": "raw", "layout": "token", "x": 1},
    ],
)
def test_unknown_configs_are_refused(config):
    with pytest.raises(ValueError, match="codec"):
        codec_from_config(config)


def test_the_registry_is_complete():
    assert {cls.name: cls for cls in (Raw, Blosc2ShuffleZstd, ExponentPlanes)} == CODECS


@pytest.mark.parametrize("codec", ALL)
def test_a_destination_of_another_size_is_never_written(codec):
    frame = np.ones((2, 8, 8), np.uint16)
    coded = memoryview(codec.encode(frame))
    guarded = np.zeros((4, 8, 8), np.uint16)
    for out in (guarded[:1], guarded[:3]):
        with pytest.raises(ValueError, match="bytes"):
            codec.decode(coded, out)
    assert not guarded.any()


def test_garbage_is_a_value_error():
    good = Blosc2ShuffleZstd().encode(np.arange(4096, dtype=np.uint16))
    for damaged in (b"", good[:10], good[:40], good[:16] + bytes(len(good) - 16)):
        with pytest.raises(ValueError, match=r".+"):
            Blosc2ShuffleZstd().decode(memoryview(damaged), np.empty(4096, np.uint16))


def test_decoding_releases_the_gil():
    # While one thread decodes one large frame the main thread must get to run.
    frame = np.random.default_rng(0).normal(size=1 << 23).astype(np.float32).view(np.uint32)
    codec = Blosc2ShuffleZstd(typesize=4)
    coded, out = memoryview(codec.encode(frame)), np.empty_like(frame)
    worker = threading.Thread(target=codec.decode, args=(coded, out))
    ticks, longest, last = 0, 0.0, time.perf_counter()
    worker.start()
    started = last
    while worker.is_alive():
        now = time.perf_counter()
        longest, last, ticks = max(longest, now - last), now, ticks + 1
    total = time.perf_counter() - started
    assert longest < total / 2, (longest, total, ticks)
