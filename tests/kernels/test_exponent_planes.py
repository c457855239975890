"""Exponent planes: the compiled coder, its portable loop and the numpy reference write and read the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_marks import needs_build

from sessiond.kernels import exponent_planes
from sessiond.kernels.exponent_planes import pack, pack_reference, unpack, unpack_reference
from sessiond.kernels.native_library import lib

SHAPES = [(3, 128, 64), (1, 1, 8), (1, 1, 1), (2, 5, 7), (3, 40, 80), (2, 128, 128), (1, 3, 192)]


def bits(values: np.ndarray) -> np.ndarray:
    """fp32 values as bf16 bit patterns, cut off."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def frames(shape):
    """Any bits, what a model makes, all zero, -inf, NaN and subnormals, one odd value in a constant channel."""
    rng = np.random.default_rng(3)
    normal = rng.standard_normal(shape)
    odd = np.full(shape, 0x3F80, np.uint16)
    odd[-1, -1, -1] = 0x0001
    yield rng.integers(0, 1 << 16, shape).astype(np.uint16)
    yield bits(normal)
    yield bits(normal * rng.lognormal(0, 3, shape[::2])[:, None, :])
    yield np.zeros(shape, np.uint16)
    yield np.full(shape, 0xFF80, np.uint16)
    yield np.where(normal > 0, 0x7FC1, 0x8001).astype(np.uint16)
    yield odd


@pytest.mark.parametrize("shape", SHAPES)
def test_every_coder_and_decoder_agrees_on_every_bit(shape):
    for frame in frames(shape):
        coded = pack(frame)
        assert coded == pack_reference(frame)
        for decode in (unpack, unpack_reference):
            out = np.full(shape, 0xABCD, np.uint16)
            decode(memoryview(coded), out)
            np.testing.assert_array_equal(out, frame)


@needs_build
@pytest.mark.parametrize("shape", SHAPES)
def test_the_portable_loop_decodes_the_same(shape):
    for frame in frames(shape):
        coded = np.frombuffer(pack_reference(frame), np.uint8)
        out = np.full(shape, 0xABCD, np.uint16)
        n_groups, n_tokens, dim = shape
        failed = lib.unpack_exponents(
            coded.ctypes.data, len(coded), out.ctypes.data, n_tokens * dim, n_groups, n_tokens, dim, 1
        )
        assert failed == 0
        np.testing.assert_array_equal(out, frame)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 70)),
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0, 6),
)
def test_random_frames_round_trip(shape, seed, spread):
    rng = np.random.default_rng(seed)
    frame = bits(rng.standard_normal(shape) * rng.lognormal(0, spread, shape))
    coded = pack(frame)
    assert coded == pack_reference(frame)
    out = np.empty(shape, np.uint16)
    unpack(memoryview(coded), out)
    np.testing.assert_array_equal(out, frame)


@pytest.mark.parametrize("decode", [unpack, unpack_reference])
def test_a_destination_inside_a_longer_buffer_is_filled_and_nothing_else(decode):
    frame = next(iter(frames((3, 9, 64))))
    around = np.full((3, 30, 64), 9, np.uint16)
    decode(memoryview(pack(frame)), around[:, 11:20])
    np.testing.assert_array_equal(around[:, 11:20], frame)
    assert (around[:, :11] == 9).all()
    assert (around[:, 20:] == 9).all()


@pytest.mark.parametrize("decode", [unpack, unpack_reference])
@pytest.mark.parametrize("shape", [(3, 9, 64), (2, 5, 7)])
def test_what_is_not_exactly_a_frame_is_refused(decode, shape):
    for frame in frames(shape):
        coded = pack(frame)
        bad = [b"", coded[:1], coded[:-1], coded + b"\0", b"\0" + coded[1:], b"\x06" + coded[1:], bytes(len(coded))]
        for damaged in bad:
            with pytest.raises(ValueError, match=r"bytes|escaped"):
                decode(memoryview(damaged), np.empty(shape, np.uint16))
        for other in ((shape[0], shape[1] + 1, shape[2]), (shape[0], shape[1] - 1, shape[2])):
            around = np.full((shape[0], shape[1] + 9, shape[2]), 9, np.uint16)
            with pytest.raises(ValueError, match=r"bytes|escaped"):
                decode(memoryview(coded), around[:, : other[1]])
            assert (around[:, other[1] :] == 9).all()


def test_normal_values_shrink_below_the_promise():
    frame = bits(np.random.default_rng(0).standard_normal((3, 128, 64)))
    assert len(pack(frame)) <= 0.71 * frame.nbytes


@needs_build
def test_more_tokens_than_a_counter_holds_are_refused():
    with pytest.raises(ValueError, match="65535"):
        pack(np.zeros((1, 65536, 1), np.uint16))


def test_without_the_compiled_library_the_reference_serves(monkeypatch):
    monkeypatch.setattr(exponent_planes, "BUILT", False)
    monkeypatch.setattr(exponent_planes, "lib", None)
    frame = next(iter(frames((2, 5, 64))))
    out = np.empty_like(frame)
    unpack(memoryview(pack(frame)), out)
    np.testing.assert_array_equal(out, frame)
