"""kill -9 at random instants: what was acknowledged is there, whole; SESSIOND_KILLS sets how often."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from storage_samples import BLOCK_MAP, LOG_MAP, assert_kv_equal, destinations, kv_arrays, revision

from sessiond.storage.blocks import BlockStore
from sessiond.storage.environment import Environment
from sessiond.storage.kv import KVOwner
from sessiond.storage.log import LogStore

KILLS = int(os.environ.get("SESSIOND_KILLS", "20"))
SEED = int(os.environ.get("SESSIOND_SEED", str(time.time_ns() % 2**32)))


def run_and_kill(root: Path, first: int, n_acknowledged: int, seconds: float) -> list[str]:
    """Let the writer run for `seconds` after so many acknowledgements, kill it, return what it reported."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("crash_writer.py")), str(root), str(first)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        reported = b"".join(process.stdout.readline() for _ in range(n_acknowledged))
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        reported += process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    return reported.decode().splitlines()[:-1] if not reported.endswith(b"\n") else reported.decode().split()


@pytest.mark.timeout(60 + 10 * KILLS)
def test_no_acknowledged_write_is_lost_or_torn_by_kill_9(tmp_path):
    rng = random.Random(SEED)
    acknowledged: set[str] = set()
    first = n_waited_for = 0
    for kill in range(KILLS):
        context = f"seed {SEED}, kill {kill}"
        n_acknowledged = rng.randint(1, 10)  # however slow the disk is
        reported = run_and_kill(tmp_path, first, n_acknowledged, rng.uniform(0, 0.12))
        assert len(reported) >= n_acknowledged, context
        n_waited_for += n_acknowledged
        acknowledged.update(reported)
        log_env = Environment(str(tmp_path / "log"), map_bytes=LOG_MAP)
        block_env = Environment(str(tmp_path / "blocks"), map_bytes=BLOCK_MAP)
        try:
            check(LogStore(log_env), BlockStore(block_env), acknowledged, context)
        finally:
            log_env.close()
            block_env.close()
        first = max(int(name[1:]) for name in acknowledged) + 10_000
    assert len(acknowledged) >= n_waited_for


def check(log: LogStore, blocks: BlockStore, acknowledged: set[str], context: str) -> None:
    present = {record.revision_id for record in log.revisions_of_session("t", "s1")}
    assert {f"r{name[1:]}" for name in acknowledged if name[0] == "t"} <= present, context
    for name in present:  # acknowledged or not: all of a batch or nothing
        turn = int(name[1:])
        assert log.revision("t", name) == revision(revision_id=name)
        assert log.messages("t", name) == b"m" * (turn % 5000), context
        assert log.tokens("t", name, expected=3)[0].tolist() == [turn, turn + 1, turn + 2], context
    cells = {int(name[1:]) for name in acknowledged if name[0] == "c"}
    referenced = {int.from_bytes(ref.prefix_hash, "big") for ref in log.all_cell_refs("t")}
    assert cells <= referenced, context
    for turn in referenced:  # whatever is referenced is readable
        buffers, out = destinations(2, n=8)
        blocks.read_into(KVOwner("t", "cell", turn.to_bytes(16, "big")), 0, 8, 2, out)
        assert_kv_equal(buffers, kv_arrays(2, n=8, seed=turn))
