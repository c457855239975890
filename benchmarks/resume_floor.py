"""The least that resuming a session can take: read and decode its blocks, compute its new tokens. One JSON line last.

`python benchmarks/resume_floor.py DATA_DIR`, with the daemon stopped. The blocks are those of the directory's longest
session, read by as many workers as the daemon uses into memory that is already there; the new tokens are computed in
one forward on top of them. No log, no gRPC, no scheduling, no allocation.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

from _bench import median, print_json, rounded, spin_as_the_daemon
from _model import data_dir_arguments, load_model
from _store import Stored, open_longest

from sessiond.cache import SessionCache
from sessiond.model import Feed, Model
from sessiond.storage.kv import KVOwner
from sessiond.types import Span


def read_blocks(stored: Stored, cache: SessionCache, pool: ThreadPoolExecutor, n_workers: int) -> int:
    """Read, check and decode all blocks into `cache`, cells striped over the workers. Returns the bytes read."""
    store, tenant, cell = stored.store, stored.record.tenant, stored.store.cell_tokens

    def read(owner: KVOwner, span: Span) -> int:
        return store.blocks.read_into(
            owner, span.start, len(span), cache.shape.n_layers, lambda layer, part: cache.array(layer, int(part), span)
        )

    def stripe(first: int) -> int:
        return sum(
            read(KVOwner(tenant, "cell", ref.prefix_hash), Span(ref.start, ref.start + cell))
            for ref in stored.cells[first::n_workers]
        )

    # As the daemon does: the tail first, sealed cells over what it shares with them.
    total, tail = 0, stored.tail
    if tail:
        owner = KVOwner(tenant, "tail", tail.revision_id.encode(), tail.generation)
        total += read(owner, Span(tail.start, tail.start + tail.length))
    return total + sum(pool.map(stripe, range(n_workers)))


def measure(stored: Stored, model: Model, n_new: int, repeats: int) -> dict[str, object]:
    """Medians of both parts, the first repeat left out: it makes the memory and loads the code."""
    cache = model.new_cache()
    n_workers = max(2, os.cpu_count() or 1)
    reading, computing, n_bytes = [], [], 0
    new_ids = stored.ids[:n_new].tolist()  # which tokens they are does not matter, only how many
    with ThreadPoolExecutor(n_workers) as pool:
        for _ in range(repeats + 1):
            began = time.perf_counter()
            n_bytes = read_blocks(stored, cache, pool, n_workers)
            read_at = time.perf_counter()
            model.step([Feed(cache, new_ids, stored.persisted)], [n_new - 1])
            reading.append((read_at - began) * 1e3)
            computing.append((time.perf_counter() - read_at) * 1e3)
    read_ms, compute_ms = median(reading[1:]), median(computing[1:])
    return {
        "floor_ms": rounded(read_ms + compute_ms),
        "floor_read_ms": rounded(read_ms),
        "floor_compute_ms": rounded(compute_ms),
        "bytes_read": n_bytes,
        "tokens_restored": stored.persisted,
        "new_tokens": n_new,
        "workers": n_workers,
        "repeats": repeats,
    }


def main() -> None:
    parser = data_dir_arguments(__doc__)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    spin_as_the_daemon()
    model = load_model(options.model)
    with open_longest(options.data_dir) as stored:
        print_json(measure(stored, model, options.new_tokens, options.repeats))


if __name__ == "__main__":
    main()
