"""Keys of both environments (docs/format.md, "Keys"): built here, read back here, shown to people here."""

from __future__ import annotations

import struct

from sessiond import errors
from sessiond.types import Part

MAX_TENANT_BYTES = 128
MAX_ID_BYTES = 64
MAX_REQUEST_ID_BYTES = 128
PREFIX_HASH_BYTES = 16

SESSION = 0x73
REVISION = 0x72
REVISION_INDEX = 0x78
MESSAGES = 0x6D
TOKENS = 0x74
REQUEST = 0x71
CELL_REF = 0x63
TAIL_REF = 0x6C
PIN = 0x66
PRIOR = 0x76
IDENTITY = 0x69
PROFILE = 0x70
TALLY = 0x61
KV_CELL = 0x43
KV_TAIL = 0x54

KIND_NAMES = {
    SESSION: "session",
    REVISION: "revision",
    REVISION_INDEX: "revision-index",
    MESSAGES: "messages",
    TOKENS: "tokens",
    REQUEST: "request",
    CELL_REF: "cell-ref",
    TAIL_REF: "tail-ref",
    PIN: "pin",
    PRIOR: "prior",
    IDENTITY: "identity",
    PROFILE: "profile",
    TALLY: "tally",
    KV_CELL: "kv-cell",
    KV_TAIL: "kv-tail",
}

_U64 = struct.Struct(">Q")
_KV_FIELDS = struct.Struct(">QQBHH")  # generation, start, part, first layer, first head


def tenant_prefix(tenant: str) -> bytes:
    """Start of every key of `tenant`. Raises BadRequest unless 1 to 128 UTF-8 bytes."""
    return _string(tenant, MAX_TENANT_BYTES, "tenant")


def kind_prefix(tenant: str, kind: int) -> bytes:
    return tenant_prefix(tenant) + bytes((kind,))


def record_key(tenant: str, kind: int, *ids: str) -> bytes:
    """Key of a record whose fields are strings; the last one of a request may be longer than an id."""
    return kind_prefix(tenant, kind) + b"".join(
        _string(value, MAX_REQUEST_ID_BYTES if kind == REQUEST and i == 1 else MAX_ID_BYTES, "id")
        for i, value in enumerate(ids)
    )


def tokens_key(tenant: str, revision_id: str, start: int) -> bytes:
    return record_key(tenant, TOKENS, revision_id) + _U64.pack(start)


def tokens_start(key: bytes) -> int:
    """The offset within the revision that a token segment's key names."""
    return int(_U64.unpack(key[-8:])[0])


def cell_ref_key(tenant: str, prefix_hash: bytes) -> bytes:
    """Raises BadRequest unless the hash has 16 bytes."""
    if len(prefix_hash) != PREFIX_HASH_BYTES:
        raise errors.BadRequest(f"a prefix hash has {PREFIX_HASH_BYTES} bytes, not {len(prefix_hash)}")
    return kind_prefix(tenant, CELL_REF) + prefix_hash


def global_key(kind: int, name: str) -> bytes:
    """Key of a record that belongs to no tenant: the empty tenant, which no client can have."""
    return bytes((0, kind)) + _string(name, MAX_ID_BYTES, "id")


def kv_owner_prefix(tenant: str, kind: int, owner_id: bytes, generation: int) -> bytes:
    """Start of the keys of one owner's KV records (blocks environment)."""
    if not 1 <= len(owner_id) <= MAX_ID_BYTES:
        raise errors.BadRequest(f"a KV owner has 1 to {MAX_ID_BYTES} bytes, not {len(owner_id)}")
    return kind_prefix(tenant, kind) + bytes((len(owner_id),)) + owner_id + _U64.pack(generation)


def kv_key(owner_prefix: bytes, start: int, part: Part, layer: int, head: int = 0) -> bytes:
    return owner_prefix + _KV_FIELDS.pack(0, start, part, layer, head)[8:]


def kv_part_prefix(owner_prefix: bytes, start: int, part: Part) -> bytes:
    """Start of the keys of all layers of one run and part."""
    return kv_key(owner_prefix, start, part, 0)[:-4]


def split(key: bytes) -> tuple[str, int, bytes]:
    """(tenant, kind, the rest). Raises ValueError on bytes that are no key."""
    n = key[0] if key else 0
    if len(key) < n + 2:
        raise ValueError("not a key")
    return key[1 : 1 + n].decode("utf-8"), key[1 + n], key[2 + n :]


def split_strings(rest: bytes) -> list[str]:
    """The string fields in `rest`. Raises ValueError on bytes that are none."""
    out = []
    at = 0
    while at < len(rest):
        end = at + 1 + rest[at]
        if end > len(rest):
            raise ValueError("string field is cut")
        out.append(rest[at + 1 : end].decode("utf-8"))
        at = end
    return out


def after(prefix: bytes) -> bytes:
    """A key greater than all that start with `prefix`: no kind byte is 0xff, no field is that long."""
    return prefix + b"\xff" * (511 - len(prefix))


def readable(key: bytes) -> str:
    """The key for people: `tenant/kind/fields`. Never fails, whatever the bytes."""
    try:
        tenant, kind, rest = split(key)
        name = KIND_NAMES[kind]
        return "/".join((tenant or "-", name, *_readable_fields(kind, rest)))
    except (ValueError, KeyError, IndexError, struct.error):
        return f"0x{key.hex()}"


def _readable_fields(kind: int, rest: bytes) -> list[str]:
    if kind == CELL_REF:
        return [rest.hex()]
    if kind == TOKENS:
        return [*split_strings(rest[:-8]), str(tokens_start(rest))]
    if kind in (KV_CELL, KV_TAIL):
        owner, fields = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        name = owner.hex() if kind == KV_CELL else owner.decode("utf-8")
        if len(fields) < _KV_FIELDS.size:
            return [name]
        generation, start, part, layer, head = _KV_FIELDS.unpack(fields)
        return [name, f"g{generation}", f"@{start}", Part(part).name, f"layer{layer}", f"head{head}"]
    return split_strings(rest)


def _string(value: str, cap: int, what: str) -> bytes:
    try:
        raw = value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise errors.BadRequest(f"{what} is not valid Unicode") from exc
    if not 1 <= len(raw) <= cap or b"\0" in raw:
        raise errors.BadRequest(f"{what} must have 1 to {cap} bytes of UTF-8 without NUL, not {len(raw)}")
    return bytes((len(raw),)) + raw
