"""Small valid records for the storage tests."""

from __future__ import annotations

import numpy as np

from sessiond.storage.environment import Environment
from sessiond.storage.records import CellRef, RequestRecord, RevisionRecord, SessionRecord, TailRef
from sessiond.types import Part

LOG_MAP = 64 << 20
BLOCK_MAP = 256 << 20


def session(tenant="t", session_id="s1", **changes):
    fields = {
        "tenant": tenant, "session_id": session_id, "head_revision": "r1", "root_revision": "r1",
        "model": "m", "adapter": "", "identity_id": "id1", "policy": {"name": "full"}, "labels": {"colour": "blau"},
        "created_us": 10, "updated_us": 11, "last_used_us": 12, "ttl_us": None, "expire_us": None,
        "deleted_us": None, "purge_us": None, "generation": 1, "create_request_id": "q0", "seal": True,
    }  # fmt: skip
    return SessionRecord(**(fields | changes))


def revision(tenant="t", revision_id="r1", **changes):
    fields = {
        "tenant": tenant, "revision_id": revision_id, "session_id": "s1", "parent": None, "kind": "root",
        "log_start": 0, "log_end": 3, "position_start": 0, "position_end": 3, "n_prompt": 3, "n_generated": 0,
        "finish_reason": None, "aborted": False, "created_us": 10, "request_id": "q0", "usage": {"prompt": 3},
    }  # fmt: skip
    return RevisionRecord(**(fields | changes))


def request(tenant="t", session_id="s1", request_id="q1", **changes):
    fields = {
        "tenant": tenant, "session_id": session_id, "request_id": request_id, "digest": "ab",
        "state": "running", "base_revision": "r1", "revision_id": "r2",
        "params": {"seed": 7}, "created_us": 20, "updated_us": 21,
    }  # fmt: skip
    return RequestRecord(**(fields | changes))


def cell_ref(tenant="t", prefix_hash=bytes(range(16)), **changes):
    fields = {
        "tenant": tenant, "prefix_hash": prefix_hash, "index": 0, "start": 0, "n_tokens": 128, "n_records": 4,
        "raw_bytes": 1000, "coded_bytes": 700, "kv_digest": "00" * 16, "profile_id": "p1",
    }  # fmt: skip
    return CellRef(**(fields | changes))


def tail_ref(tenant="t", revision_id="r1", **changes):
    fields = {
        "tenant": tenant, "revision_id": revision_id, "start": 128, "length": 9, "raw_bytes": 10,
        "coded_bytes": 7, "kv_digest": "11" * 16, "profile_id": "p1", "generation": 3,
    }  # fmt: skip
    return TailRef(**(fields | changes))


def kv_arrays(n_layers=3, G=2, n=63, D=16, seed=0, dtype=np.uint16):
    """Per layer (K, V) [G, n, D] whose high byte repeats, as exponents do."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n_layers, 2, G, n, D)).astype(np.float32)
    bits = values.view(np.uint32)
    arrays = (bits >> 16).astype(np.uint16) if dtype is np.uint16 else bits
    return [(layer[0], layer[1]) for layer in arrays]


def destinations(n_layers=3, G=2, n=63, D=16, dtype=np.uint16):
    """(buffers, out): zeroed arrays for read_into."""
    buffers = {(layer, part): np.zeros((G, n, D), dtype) for layer in range(n_layers) for part in (Part.K, Part.V)}
    return buffers, lambda layer, part: buffers[layer, part]


def assert_kv_equal(buffers, arrays):
    for layer, (k, v) in enumerate(arrays):
        np.testing.assert_array_equal(buffers[layer, Part.K], k)
        np.testing.assert_array_equal(buffers[layer, Part.V], v)


def all_values(env: Environment) -> dict[bytes, bytes]:
    """Everything an environment stores, as raw bytes."""
    with env.read() as txn:
        return {bytes(key): bytes(value) for key, value in txn.cursor()}


def overwrite(env: Environment, key: bytes, value: bytes | None) -> None:
    """Damage the store behind its back: no envelope, no checks."""
    env.submit([lambda txn: txn.delete(key) if value is None else txn.put(key, value)], 0, frees=True).result()
