"""Reading a whole environment, record by record, and checking each by itself: checksum, identity, form.

A page is copied out in one short read transaction and checked afterwards: a pinned reader makes the file grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sessiond import errors
from sessiond.storage import envelope, keys
from sessiond.storage.batch import parse
from sessiond.storage.environment import Environment
from sessiond.storage.kv import KVOwner, open_record
from sessiond.storage.records import CellRef, Record, RequestRecord, RevisionRecord, SessionRecord, TailRef
from sessiond.types import Part

PAGE_BYTES = 1 << 20
PAGE_RECORDS = 256
PAGE_KEYS = 4096

_CLASSES: dict[int, type[Record]] = {
    keys.SESSION: SessionRecord,
    keys.REVISION: RevisionRecord,
    keys.REQUEST: RequestRecord,
    keys.CELL_REF: CellRef,
    keys.TAIL_REF: TailRef,
}


@dataclass(frozen=True, slots=True)
class Extent:
    """What a KV record holds: a run of tokens of a group of layers, and its uncoded bytes."""

    start: int
    n_tokens: int
    part: Part
    first_layer: int
    n_layers: int
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class Checked:
    """One record, read and checked. `damage` says what is wrong with it; then neither record nor extent is there."""

    key: bytes
    n_bytes: int
    damage: str = ""
    record: Record | None = None  # of kinds that have a dataclass
    extent: Extent | None = None  # of KV


def pages(env: Environment, prefix: bytes = b"", start: bytes = b"") -> Iterator[list[tuple[bytes, bytes]]]:
    """All records whose key begins with `prefix`, from the key `start` on, in key order, as copies.

    Each page is a snapshot of its own: what changes meanwhile may be seen in part. Raises RecordCorrupt where the
    environment's own structure is damaged.
    """
    at: bytes | None = max(prefix, start)
    while at is not None:
        page: list[tuple[bytes, bytes]] = []
        size = 0
        following: bytes | None = None
        with env.read() as txn, txn.cursor() as cursor:
            found = cursor.set_range(at)
            while found:
                key = bytes(cursor.key())
                if not key.startswith(prefix):
                    break
                if page and (size >= PAGE_BYTES or len(page) == PAGE_RECORDS):
                    following = key
                    break
                value = bytes(cursor.value())
                page.append((key, value))
                size += len(value)
                found = cursor.next()
        at = following
        if page:
            yield page


def key_pages(env: Environment, prefix: bytes) -> Iterator[list[bytes]]:
    """The keys alone, as `pages`."""
    at: bytes | None = prefix
    while at is not None:
        page: list[bytes] = []
        following: bytes | None = None
        with env.read() as txn, txn.cursor() as cursor:
            found = cursor.set_range(at)
            while found and (key := bytes(cursor.key())).startswith(prefix):
                if len(page) == PAGE_KEYS:
                    following = key
                    break
                page.append(key)
                found = cursor.next()
        at = following
        if page:
            yield page


def kv_owners(env: Environment, prefix: bytes = b"") -> Iterator[KVOwner]:
    """Every owner that has a record of blocks, in key order, a transaction each; keys that name none are left out."""
    at = prefix
    while True:
        with env.read() as txn, txn.cursor() as cursor:
            key = bytes(cursor.key()) if cursor.set_range(at) else b""
        if not key or not key.startswith(prefix):
            return
        try:
            owner = owner_of(key)
            at = keys.after(owner.prefix)
        except (ValueError, IndexError, errors.BadRequest):
            at = key + b"\0"
        else:
            yield owner


def check_log_record(key: bytes, value: bytes) -> Checked:
    """Verify a record of the log: envelope, fields, and that the fields are those of its key."""
    view = memoryview(value)
    try:
        kind = keys.split(key)[1]
        cls = _CLASSES.get(kind)
        if cls is None:
            body = envelope.unpack(key, view)
            if kind == keys.TOKENS and len(body.body) != 5 * _count(body.header.get("n")):
                return Checked(key, len(value), "token count does not fit the body")
            return Checked(key, len(value))
        record = parse(cls, key, view)
        if key_of(record) != key:
            return Checked(key, len(value), "its fields name another key")
        return Checked(key, len(value), record=record)
    except (errors.RecordCorrupt, errors.FormatTooNew) as error:
        return Checked(key, len(value), error.metadata.get("why", error.message))
    except (ValueError, IndexError, errors.BadRequest) as error:
        return Checked(key, len(value), f"not a key of this format: {error}")


def check_kv_record(key: bytes, value: bytes) -> Checked:
    """Verify a record of blocks: envelope, frame table, each frame's checksum, and that it holds what its key says."""
    try:
        record = open_record(key, memoryview(value))
        record.check_frames()
        owner = owner_of(key)
        if keys.kv_key(owner.prefix, record.start, record.part, record.first_layer) != key:
            return Checked(key, len(value), "its header names another key")
    except (errors.RecordCorrupt, errors.FormatTooNew) as error:
        return Checked(key, len(value), error.metadata.get("why", error.message))
    except (ValueError, IndexError, errors.BadRequest) as error:
        return Checked(key, len(value), f"not a key of this format: {error}")
    heads, n, dim = record.shape
    raw = heads * n * dim * record.itemsize * record.n_layers
    return Checked(
        key, len(value), extent=Extent(record.start, n, record.part, record.first_layer, record.n_layers, raw)
    )


def owner_of(key: bytes) -> KVOwner:
    """Whose KV a key of blocks names. Raises ValueError or IndexError on bytes that are no such key."""
    tenant, kind, rest = keys.split(key)
    if kind not in (keys.KV_CELL, keys.KV_TAIL):
        raise ValueError(f"kind {kind:#x} is not KV")
    name, generation = rest[1 : 1 + rest[0]], rest[1 + rest[0] : 9 + rest[0]]
    if not name or len(name) != rest[0] or len(generation) != 8:
        raise ValueError("KV key is cut")
    return KVOwner(tenant, "cell" if kind == keys.KV_CELL else "tail", name, int.from_bytes(generation, "big"))


def key_of(record: Record) -> bytes:
    """The key that a record's own fields imply."""
    match record:
        case SessionRecord():
            return keys.record_key(record.tenant, keys.SESSION, record.session_id)
        case RevisionRecord():
            return keys.record_key(record.tenant, keys.REVISION, record.revision_id)
        case RequestRecord():
            return keys.record_key(record.tenant, keys.REQUEST, record.session_id, record.request_id)
        case CellRef():
            return keys.cell_ref_key(record.tenant, record.prefix_hash)
        case TailRef():
            return keys.record_key(record.tenant, keys.TAIL_REF, record.revision_id)


def is_complete(extents: list[Extent], ref: CellRef | TailRef) -> bool:
    """Whether these records hold all that a reference promises: every layer of K and V over its whole span."""
    n_tokens = ref.n_tokens if isinstance(ref, CellRef) else ref.length
    stop = ref.start + n_tokens
    inside = sorted((e for e in extents if ref.start <= e.start < stop), key=lambda e: (e.part, e.first_layer, e.start))
    layers = {Part.K: 0, Part.V: 0}
    at, group = stop, (Part.K, -1)
    for extent in inside:
        if (extent.part, extent.first_layer) != group:
            if at != stop or extent.first_layer != layers[extent.part]:
                return False
            group, at = (extent.part, extent.first_layer), ref.start
            layers[extent.part] += extent.n_layers
        if extent.start != at:
            return False
        at += extent.n_tokens
    return at == stop and layers[Part.K] == layers[Part.V] and sum(e.raw_bytes for e in inside) == ref.raw_bytes


def _count(n: object) -> int:
    return n if isinstance(n, int) and n > 0 else -1
