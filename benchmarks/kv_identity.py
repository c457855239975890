"""Whether restored KV is, byte for byte, the KV that was computed. One JSON line last.

`python benchmarks/kv_identity.py DATA_DIR`, with the daemon stopped. Three digests of each sealed cell must agree: the
one noted when the cell was written, that of the bytes restored from disk, and that of the KV computed here, by another
process, from the tokens alone. For the provisional tail, which depends on how its tokens came, the first two must.
"""

from __future__ import annotations

from typing import Any

from _bench import print_json
from _model import data_dir_arguments, load_model
from _store import Stored, open_longest

from sessiond.cache import SessionCache
from sessiond.model import Feed, Model
from sessiond.storage.kv import kv_digest
from sessiond.tiers import Tiers
from sessiond.types import Span


def compute(model: Model, ids: list[int], cell_tokens: int) -> SessionCache:
    """Canonical KV: each cell in a forward of its own, on top of the cells before it."""
    cache = model.new_cache()
    for start in range(0, len(ids) - len(ids) % cell_tokens, cell_tokens):
        model.step([Feed(cache, ids[start : start + cell_tokens], start)], [])
        cache.length = cache.sealed = start + cell_tokens
    return cache


def compare(stored: Stored, restored: SessionCache, computed: SessionCache) -> dict[str, Any]:
    """Which cells differ, and from what."""
    size = stored.store.cell_tokens
    not_as_written, not_as_computed = [], []
    for index, ref in enumerate(stored.cells):
        span = Span(index * size, (index + 1) * size)
        digest = kv_digest(restored.arrays(span))
        if digest != ref.kv_digest:
            not_as_written.append(index)
        if digest != kv_digest(computed.arrays(span)):
            not_as_computed.append(index)
    tail_identical = True
    if stored.tail:
        # Where the tail begins below the last sealed cell, that cell's bytes are the right ones there.
        assert stored.tail.start == stored.sealed, "the session was not settled before it was stopped"
        span = Span(stored.tail.start, stored.tail.start + stored.tail.length)
        tail_identical = kv_digest(restored.arrays(span)) == stored.tail.kv_digest
    complete = restored.length == stored.persisted and restored.sealed == stored.sealed
    good = complete and tail_identical and not not_as_written and not not_as_computed and bool(stored.cells)
    return {
        "resume_kv_identical": good,
        "cells": len(stored.cells),
        "tail_tokens": stored.tail.length if stored.tail else 0,
        "layers": restored.shape.n_layers,
        "cells_not_as_written": not_as_written,
        "cells_not_as_computed": not_as_computed,
        "tail_identical": tail_identical,
        "complete": complete,
    }


def main() -> None:
    options = data_dir_arguments(__doc__).parse_args()
    model = load_model(options.model)
    with open_longest(options.data_dir) as stored:
        record = stored.record
        tiers = Tiers(stored.store, model.shape, model.max_context, record.identity_id, stored.cells[0].profile_id)
        try:
            restored, _ = tiers.restore(record.tenant, stored.chain, stored.ids)
        finally:
            tiers.close()
        computed = compute(model, stored.ids.tolist(), stored.store.cell_tokens)
        print_json(compare(stored, restored, computed))


if __name__ == "__main__":
    main()
