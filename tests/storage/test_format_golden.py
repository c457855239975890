"""The bytes of format 1, pinned. A failure here means old data directories would not be read: see docs/format.md."""

from __future__ import annotations

import numpy as np
from storage_samples import session

from sessiond.storage import envelope, keys
from sessiond.storage.batch import LogBatch
from sessiond.storage.codec import ExponentPlanes, Raw
from sessiond.storage.kv import KVOwner, encode_kv, open_record
from sessiond.storage.records import SessionRecord, from_header
from sessiond.types import Part


def put_values(batch):
    """What the batch would store, without a store."""

    class Transaction(dict):
        def put(self, key, value):
            self[key] = value

    transaction = Transaction()
    for op in batch.ops:
        op(transaction)
    return transaction


def test_a_token_segment_of_format_1():
    batch = LogBatch()
    batch.append_tokens("acme", "rev", 2, np.array([1, 65536]), np.array([1, 0], np.uint8))
    batch.ops = batch.ops[1:]  # the first looks whether a gap would stay behind
    ((key, value),) = put_values(batch).items()
    assert key == b"\x04acme" + b"t" + b"\x03rev" + b"\0\0\0\0\0\0\0\x02"
    assert value[:24] == b"SnsD" + b"\x01\0t\0" + b"\x07\0\0\0" + b"\x0a\0\0\0" + bytes(8)
    assert value[24:40].hex() == "8583e5031fe81cc3d5f837fd9f610b06"
    assert value[40:] == b'{"n":2}' + b"\1\0\0\0\0\0\1\0" + b"\1\0"


def test_a_session_of_format_1_is_still_read():
    batch = LogBatch()
    batch.put_session(session())
    ((key, value),) = put_values(batch).items()
    stored = bytes.fromhex(
        "536e7344010073005d010000000000000000000000000000fac6245f7e66a29dd492039f115a3dc97b22616461707465"
        "72223a22222c226372656174655f726571756573745f6964223a227130222c22637265617465645f7573223a31302c22"
        "64656c657465645f7573223a6e756c6c2c226578706972655f7573223a6e756c6c2c226578747261223a7b7d2c226765"
        "6e65726174696f6e223a312c22686561645f7265766973696f6e223a227231222c226964656e746974795f6964223a22"
        "696431222c226c6162656c73223a7b22636f6c6f7572223a22626c6175227d2c226c6173745f757365645f7573223a31"
        "322c226d6f64656c223a226d222c22706f6c696379223a7b226e616d65223a2266756c6c227d2c2270757267655f7573"
        "223a6e756c6c2c22726f6f745f7265766973696f6e223a227231222c227365616c223a747275652c2273657373696f6e"
        "5f6964223a227331222c2274656e616e74223a2274222c2274746c5f7573223a6e756c6c2c22757064617465645f7573"
        "223a31317d"
    )
    assert key == b"\x01t" + b"s" + b"\x02s1"
    assert value == stored
    assert from_header(SessionRecord, envelope.unpack(key, memoryview(stored)).header) == session()


def test_a_kv_record_of_format_1():
    arrays = [(np.array([[[1, 2], [3, 4], [5, 6]]], np.uint16), np.zeros((1, 3, 2), np.uint16))]
    encoded = encode_kv(KVOwner("t", "tail", b"rev", 7), 128, arrays, codec=Raw(layout="channel"))
    key, value = encoded.records[0]
    assert key == b"\x01t" + b"T" + b"\x03rev" + (7).to_bytes(8, "big") + (128).to_bytes(8, "big") + b"\0" * 5
    assert envelope.unpack(key, memoryview(value)).header == {
        "codec": {"layout": "channel", "name": "raw"}, "dtype": 2, "heads": [0, 1], "layers": [0, 1], "n": 3,
        "part": 0, "raw": 12, "shape": [1, 3, 2], "start": 128,
    }  # fmt: skip
    assert value[24:40].hex() == "dbda5cf1d766c283c638a717a7931636"
    assert value[-12:] == np.array([1, 3, 5, 2, 4, 6], "<u2").tobytes()
    assert encoded.kv_digest == "20444d9381dc55cd350570d98f5bdf52"
    out = np.zeros((1, 3, 2), np.uint16)
    open_record(key, memoryview(value)).decode(0, out, np.empty(64, np.uint8))
    assert (out == arrays[0][Part.K]).all()


def test_a_frame_of_exponent_planes():
    """Worked out by hand from docs/format.md."""
    frame = np.array([[[0x3F80, 0xC049], [0x3F00, 0x0000], [0xBE85, 0x4100]]], np.uint16)
    coded = bytes.fromhex(
        "02"  # two bits a value: distances 0 2 1 escape 2 0
        "7f82"  # bases
        "00c900008500"  # signs and mantissas
        "0c1a"  # planes
        "00"  # the exponent of zero
    )
    assert ExponentPlanes().encode(frame) == coded
    out = np.empty_like(frame)
    ExponentPlanes().decode(memoryview(coded), out)
    assert (out == frame).all()


def test_kind_bytes_are_never_reused():
    assert bytes(sorted(keys.KIND_NAMES)).decode() == "CTacfilmpqrstvx"
