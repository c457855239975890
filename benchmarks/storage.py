"""Speed and size of the KV path: encode, write, and restore with 1 and 2 threads. One JSON line last.

Synthetic bf16 KV of the default model's shape: gaussian, with a scale for each channel. `--kv FILE.npz` takes
real KV instead: arrays `k` and `v` of uint16 [layers, G, tokens, D].
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import tempfile
import threading
import time

import numpy as np
from numpy.typing import NDArray

from sessiond.storage.blocks import BlockStore
from sessiond.storage.codec import AnyCodec, Blosc2ShuffleZstd, ExponentPlanes
from sessiond.storage.environment import Environment
from sessiond.storage.kv import KVOwner, encode_kv, kv_digest
from sessiond.types import Part

Arrays = list[tuple[NDArray[np.uint16], NDArray[np.uint16]]]
N_LAYERS, G, D, CELL = 30, 3, 64, 128


def synthetic(n_tokens: int, seed: int = 0) -> Arrays:
    """[G, n_tokens, D] bf16 bit patterns a layer: normal values times a log-normal scale for each channel."""
    rng = np.random.default_rng(seed)

    def one() -> NDArray[np.uint16]:
        scale = np.exp(rng.normal(0, 0.7, (G, 1, D)))
        values = (rng.normal(size=(G, n_tokens, D)) * scale).astype(np.float32)
        return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)

    return [(one(), one()) for _ in range(N_LAYERS)]


def from_file(path: str) -> Arrays:
    with np.load(path) as file:
        return list(zip(file["k"], file["v"], strict=True))


def restore_seconds(
    blocks: BlockStore, owners: list[KVOwner], out: NDArray[np.uint16], n_threads: int, repeats: int
) -> float:
    """Best time to read, verify and decode every cell into out [layer, part, G, T, D] (strided)."""

    def work(first: int) -> None:
        for cell in range(first, len(owners), n_threads):
            span = slice(cell * CELL, (cell + 1) * CELL)
            blocks.read_into(
                owners[cell], cell * CELL, CELL, len(out), lambda layer, part, s=span: out[layer, part][:, s]
            )

    best = float("inf")
    for _ in range(repeats):
        threads = [threading.Thread(target=work, args=(first,)) for first in range(n_threads)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - started)
    return best


CODECS = (ExponentPlanes(), Blosc2ShuffleZstd())


def measure(arrays: Arrays, n_cells: int, codec: AnyCodec, folder: str, repeats: int) -> dict[str, object]:
    n_source = arrays[0][0].shape[1] // CELL
    cells = [
        [(k[:, at : at + CELL], v[:, at : at + CELL]) for k, v in arrays]
        for at in ((cell % n_source) * CELL for cell in range(n_cells))
    ]
    owners = [KVOwner("bench", "cell", cell.to_bytes(16, "big")) for cell in range(n_cells)]
    with contextlib.closing(Environment(os.path.join(folder, codec.name), map_bytes=16 << 30)) as env:
        blocks = BlockStore(env)
        started = time.perf_counter()
        encoded = [encode_kv(o, i * CELL, c, codec=codec) for i, (o, c) in enumerate(zip(owners, cells, strict=True))]
        encode_s = time.perf_counter() - started
        started = time.perf_counter()
        for done in [blocks.write(cell.records) for cell in encoded]:
            done.result()
        write_s = time.perf_counter() - started
        raw = sum(cell.raw_bytes for cell in encoded)
        coded = sum(cell.coded_bytes for cell in encoded)
        shape = arrays[0][0].shape
        out = np.zeros((len(arrays), 2, shape[0], n_cells * CELL, shape[2]), np.uint16)
        seconds = {n: restore_seconds(blocks, owners, out, n, repeats) for n in (1, 2)}
        # No speed claim without a green check.
        for cell, source in enumerate(cells):
            span = slice(cell * CELL, (cell + 1) * CELL)
            got = [(layer[Part.K][:, span], layer[Part.V][:, span]) for layer in out]
            assert kv_digest(got) == encoded[cell].kv_digest == kv_digest(source), f"cell {cell} differs"
        started = time.perf_counter()
        kv_digest([(out[i, Part.K], out[i, Part.V]) for i in range(len(arrays))])
        digest_s = time.perf_counter() - started
        return {
            "codec": codec.name,
            "raw_mb": round(raw / 1e6, 1),
            "ratio": round(coded / raw, 4),
            "ratio_on_disk": round(blocks.stat().used_bytes / raw, 4),
            "encode_mb_s": round(raw / encode_s / 1e6),
            "write_coded_mb_s": round(coded / write_s / 1e6),
            "digest_mb_s": round(raw / digest_s / 1e6),
            "restore_ms_1_thread": round(seconds[1] * 1e3, 1),
            "restore_ms_2_threads": round(seconds[2] * 1e3, 1),
            "restore_mb_s_2_threads": round(raw / seconds[2] / 1e6),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kv", help="npz with real KV instead of synthetic")
    parser.add_argument("--cells", type=int, default=47)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    arrays = from_file(options.kv) if options.kv else synthetic(8 * CELL)
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(arrays, options.cells, codec, folder, options.repeats) for codec in CODECS]
    for result in results:
        print(result)
    summary = {
        "benchmark": "storage",
        "kv": "file" if options.kv else "synthetic",
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "page_cache": "warm",
        "results": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
