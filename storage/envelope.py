"""The envelope around every stored value (docs/format.md, "The envelope").

Nothing here parses a byte before the checksum over key, header and body has verified.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_128

from sessiond import errors
from sessiond.storage.keys import readable

MAGIC = b"SnsD"
MAJOR, MINOR = 1, 0
MAX_HEADER_BYTES = 16 << 20
MAX_BODY_BYTES = 256 << 20
MAX_PAYLOAD_BYTES = 256 << 20

_PREFIX = struct.Struct("<4sBBBBIIQ")  # magic, major, minor, kind, zero, header, body, payload lengths
_CHECKED = _PREFIX.size  # 24: what the checksum covers of the prefix
HEAD_BYTES = _CHECKED + 16
CHECKSUM = slice(_CHECKED, HEAD_BYTES)  # where the checksum stands in a value

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Envelope:
    """A verified record. `body` and `payload` alias the value and live as long as it does."""

    header: Json
    body: memoryview
    payload: memoryview


def canonical_json(value: object) -> bytes:
    """Equal values give equal bytes. Raises ValueError on NaN, infinity or an unserializable value."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except TypeError as exc:
        raise ValueError(str(exc)) from exc
    return text.encode("utf-8")


def pack(key: bytes, header: Json, body: bytes | bytearray = b"", payload: tuple[bytes, ...] = ()) -> bytes:
    """Build the value to store under `key`; the kind byte is taken from the key.

    Raises BadRequest if the header is no JSON or a part exceeds its cap: no reader would accept it.
    """
    try:
        head = canonical_json(header)
    except ValueError as exc:
        raise errors.BadRequest(f"record {readable(key)} cannot be stored as JSON: {exc}") from exc
    n_payload = sum(map(len, payload))
    if len(head) > MAX_HEADER_BYTES or len(body) > MAX_BODY_BYTES or n_payload > MAX_PAYLOAD_BYTES:
        raise errors.BadRequest(f"record {readable(key)} is too large to store")
    prefix = _PREFIX.pack(MAGIC, MAJOR, MINOR, kind_of(key), 0, len(head), len(body), n_payload)
    return b"".join((prefix, _checksum(key, prefix, head, body), head, body, *payload))


def unpack(key: bytes, value: memoryview) -> Envelope:
    """Verify and split a stored value.

    Raises RecordCorrupt (naming the key) on any mismatch, FormatTooNew for a record that verifies but
    was written by a newer major version.
    """
    if len(value) < HEAD_BYTES:
        raise corrupt(key, "shorter than an envelope")
    magic, major, _minor, kind, zero, n_header, n_body, n_payload = _PREFIX.unpack_from(value)
    if magic != MAGIC:
        raise corrupt(key, "wrong magic")
    if n_header > MAX_HEADER_BYTES or n_body > MAX_BODY_BYTES or n_payload > MAX_PAYLOAD_BYTES:
        raise corrupt(key, "a length exceeds its cap")
    body_at = HEAD_BYTES + n_header
    payload_at = body_at + n_body
    if payload_at + n_payload != len(value):
        raise corrupt(key, "lengths do not add up")
    if not _authentic(key, value, payload_at):
        raise corrupt(key, "checksum mismatch")
    if major > MAJOR:
        raise errors.FormatTooNew(f"record {readable(key)} has version {major}; this program reads up to {MAJOR}")
    if kind != kind_of(key) or zero or major == 0:
        raise corrupt(key, "kind or version does not fit the key")
    return Envelope(_parse_header(key, value[HEAD_BYTES:body_at]), value[body_at:payload_at], value[payload_at:])


def kind_of(key: bytes) -> int:
    """The kind byte, which follows the length-prefixed tenant."""
    return key[1 + key[0]]


def corrupt(key: bytes, why: str) -> errors.RecordCorrupt:
    """The error for a damaged record, with its key in readable form."""
    name = readable(key)
    return errors.RecordCorrupt(f"record {name}: {why}", key=name, why=why)


def checksum_of(key: bytes, value: memoryview) -> bytes:
    """What the checksum of a value without payload should be, whatever it is."""
    return _checksum(key, value[:_CHECKED], value[HEAD_BYTES:])


def _checksum(key: bytes, prefix: bytes | memoryview, *rest: bytes | bytearray | memoryview) -> bytes:
    state = xxh3_128(struct.pack("<I", len(key)) + key)
    state.update(prefix)
    for part in rest:
        state.update(part)
    return state.digest()


def _authentic(key: bytes, value: memoryview, payload_at: int) -> bool:
    stored = value[_CHECKED:HEAD_BYTES]
    return _checksum(key, value[:_CHECKED], value[HEAD_BYTES:payload_at]) == stored


def _parse_header(key: bytes, raw: memoryview) -> Json:
    try:
        header = json.loads(bytes(raw))
    except (ValueError, RecursionError) as exc:
        raise corrupt(key, "header is not JSON") from exc
    if not isinstance(header, dict):
        raise corrupt(key, "header is not an object")
    return header
