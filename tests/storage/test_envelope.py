from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond import errors
from sessiond.storage import envelope, keys

KEY = keys.record_key("tenant", keys.SESSION, "abc")
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@given(
    header=st.dictionaries(st.text(max_size=8), json_values, max_size=5),
    body=st.binary(max_size=300),
    frames=st.lists(st.binary(max_size=50), max_size=4),
)
def test_round_trip(header, body, frames):
    record = envelope.unpack(KEY, memoryview(envelope.pack(KEY, header, body, tuple(frames))))
    assert (record.header, bytes(record.body), bytes(record.payload)) == (header, body, b"".join(frames))


def test_every_flipped_bit_outside_the_payload_is_found():
    value = envelope.pack(KEY, {"a": 1, "b": "x"}, b"body bytes")
    for position in range(len(value)):
        for bit in range(8):
            damaged = bytearray(value)
            damaged[position] ^= 1 << bit
            with pytest.raises(errors.RecordCorrupt, match="tenant/session/abc"):
                envelope.unpack(KEY, memoryview(damaged))


def test_every_truncation_and_extension_is_found():
    value = envelope.pack(KEY, {"a": 1}, b"body", (b"frame",))
    for length in range(len(value)):
        with pytest.raises(errors.RecordCorrupt):
            envelope.unpack(KEY, memoryview(value[:length]))
    with pytest.raises(errors.RecordCorrupt):
        envelope.unpack(KEY, memoryview(value + b"\0"))


def test_a_record_does_not_verify_under_another_key():
    value = memoryview(envelope.pack(KEY, {}, b"body"))
    for tenant, kind, name in (
        ("tenant", keys.SESSION, "abd"), ("tenanu", keys.SESSION, "abc"), ("tenant", keys.REVISION, "abc"),
    ):  # fmt: skip
        other = keys.record_key(tenant, kind, name)
        with pytest.raises(errors.RecordCorrupt):
            envelope.unpack(other, value)


def test_random_bytes_give_typed_errors_only():
    rng = random.Random(5)
    for _ in range(2000):
        raw = envelope.MAGIC * rng.randint(0, 1) + rng.randbytes(rng.randint(0, 200))
        with pytest.raises(errors.RecordCorrupt):
            envelope.unpack(KEY, memoryview(raw))


def test_a_huge_claimed_length_is_refused_before_anything_is_allocated():
    value = bytearray(envelope.pack(KEY, {}, b""))
    value[16:24] = b"\xff" * 8
    with pytest.raises(errors.RecordCorrupt, match="cap"):
        envelope.unpack(KEY, memoryview(value))


def test_newer_major_version_is_named_only_if_the_record_verifies(monkeypatch):
    monkeypatch.setattr(envelope, "MAJOR", 2)
    value = envelope.pack(KEY, {"a": 1})
    monkeypatch.undo()
    with pytest.raises(errors.FormatTooNew, match="version 2"):
        envelope.unpack(KEY, memoryview(value))
    damaged = bytearray(value)
    damaged[-1] ^= 1
    with pytest.raises(errors.RecordCorrupt):
        envelope.unpack(KEY, memoryview(damaged))


def test_without_the_checksum_the_same_flip_is_silent(monkeypatch):
    value = bytearray(envelope.pack(KEY, {"a": 1}, b"body"))
    value[-1] ^= 1
    monkeypatch.setattr(envelope, "_authentic", lambda *_: True)
    assert bytes(envelope.unpack(KEY, memoryview(value)).body) == b"bodx"


def test_json_is_canonical_and_refuses_what_it_cannot_carry():
    assert envelope.canonical_json({"b": 1, "a": "ä"}) == '{"a":"ä","b":1}'.encode()
    for bad in (float("nan"), {"x": object()}, {"x": b"bytes"}):
        with pytest.raises(ValueError, match=r".+"):
            envelope.canonical_json(bad)


def test_too_large_a_record_is_not_written(monkeypatch):
    monkeypatch.setattr(envelope, "MAX_BODY_BYTES", 10)
    with pytest.raises(errors.BadRequest, match="too large"):
        envelope.pack(KEY, {}, bytes(11))
