"""Run by test_durability: writes turns as fast as it can and reports each acknowledgement on stdout."""

from __future__ import annotations

import os
import sys

import numpy as np
from storage_samples import BLOCK_MAP, LOG_MAP, cell_ref, kv_arrays, revision

from sessiond.storage.batch import LogBatch
from sessiond.storage.blocks import BlockStore
from sessiond.storage.codec import Raw
from sessiond.storage.environment import Environment
from sessiond.storage.kv import KVOwner, encode_kv
from sessiond.storage.log import LogStore


def main(root: str, first: int) -> None:
    log = LogStore(Environment(f"{root}/log", map_bytes=LOG_MAP))
    blocks = BlockStore(Environment(f"{root}/blocks", map_bytes=BLOCK_MAP))
    for turn in range(first, first + 100_000):
        name, digest = f"r{turn}", turn.to_bytes(16, "big")
        batch = LogBatch()
        batch.put_revision(revision(revision_id=name), b"m" * (turn % 5000))
        batch.append_tokens("t", name, 0, np.arange(turn, turn + 3))
        done = log.write(batch)
        done.add_done_callback(lambda _, turn=turn: os.write(1, b"t%d\n" % turn))
        if turn % 4 == 0:
            # Blocks first, then the reference to them.
            blocks.write(
                encode_kv(KVOwner("t", "cell", digest), 0, kv_arrays(2, n=8, seed=turn), codec=Raw()).records
            ).result()
            reference = LogBatch()
            reference.put_cell_ref(cell_ref(prefix_hash=digest))
            log.write(reference).result()
            os.write(1, b"c%d\n" % turn)
        if turn % 16 == 0:
            done.result()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
