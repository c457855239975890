"""Chained names of token prefixes: the key under which a sealed cell is stored and shared.

h0 = B(domain, identity, tenant);  h(i+1) = B(h(i), token ids of cell i).  Cell i is named by h(i+1), so
equal names mean equal identity, tenant and *all* tokens up to the cell's end.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

HASH_BYTES = 16
_DOMAIN = b"sessiond.prefix.1"


def prefix_root(tenant: str, identity_id: str) -> bytes:
    """h0: the chain's start."""
    return _digest(_DOMAIN + _string(identity_id) + _string(tenant))


def extend_prefix(parent: bytes, cell_ids: NDArray[Any]) -> bytes:
    """The next hash after `parent` (16 bytes) for one whole cell's token ids [cell_tokens]."""
    assert len(parent) == HASH_BYTES, len(parent)
    return _digest(parent + struct.pack("<I", len(cell_ids)) + cell_ids.astype("<u4").tobytes())


def prefix_hashes(
    tenant: str, identity_id: str, ids: NDArray[Any], cell_tokens: int, *, parent: bytes | None = None
) -> list[bytes]:
    """One hash for each whole cell in `ids` [n]; an unfilled tail has none.

    Incremental: with `parent` (the hash of the cell before ids[0]) the chain goes on from there.
    """
    if parent is None:
        parent = prefix_root(tenant, identity_id)
    ids = np.asarray(ids)
    out = []
    for start in range(0, len(ids) - cell_tokens + 1, cell_tokens):
        parent = extend_prefix(parent, ids[start : start + cell_tokens])
        out.append(parent)
    return out


def _digest(data: bytes) -> bytes:
    return blake3(data).digest(HASH_BYTES)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<I", len(raw)) + raw
