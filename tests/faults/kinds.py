"""Every kind of fault run, with how many trials each column makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One module with `run(count, seed, scratch) -> Outcome`.

    A column is cut into chunks of at most `chunk` trials, each with its own seed and its own process, so a run may
    fork and may be killed. `slice`, `ci` and `release` count trials. With `alone`, no other chunk runs beside it. With
    `in_memory`, its folder is on a tmpfs if there is one: for kinds that do not depend on what the disk does.
    """

    name: str
    module: str
    slice: int
    ci: int
    release: int
    chunk: int
    alone: bool = False
    in_memory: bool = False
    timeout_s: float = 900.0


KINDS: tuple[Kind, ...] = (
    Kind("store_kill", "store_kill", slice=60, ci=2_000, release=20_000, chunk=250),
    Kind("store_power", "store_power", slice=8, ci=150, release=2_000, chunk=25, in_memory=True),
    Kind("store_disk_full", "store_disk_full", slice=6, ci=50, release=500, chunk=25),
    Kind("store_io_error", "store_io_error", slice=40, ci=600, release=6_000, chunk=100, in_memory=True),
    Kind(
        "store_bit_flips", "store_bit_flips", slice=10_000, ci=100_000, release=1_000_000, chunk=10_000, in_memory=True
    ),
    Kind("store_pages", "store_pages", slice=400, ci=10_000, release=100_000, chunk=1_000, in_memory=True),
    # Of the whole daemon; a chunk pays some seconds for importing torch.
    # A failing sequence is shrunk for up to five minutes.
    Kind("state_machine", "state_machine", slice=5, ci=500, release=5_000, chunk=250, timeout_s=1500.0),
    # 98 points, in two chunks of equal size: see kill_daemon.run.
    Kind("kill_daemon", "kill_daemon", slice=2, ci=98, release=98 * 25, chunk=49),
    Kind("resume_exactness", "resume_exactness", slice=9, ci=200, release=5_000, chunk=100),
    Kind("failed_restore", "failed_restore", slice=17, ci=17 * 20, release=17 * 500, chunk=17 * 10),
    Kind("dropped_retries", "dropped_retries", slice=200, ci=2_000, release=20_000, chunk=1_000),
)

BY_NAME = {kind.name: kind for kind in KINDS}
COLUMNS = ("slice", "ci", "release")


def chunks(kind: Kind, column: str, seed: int, part: tuple[int, int] = (1, 1)) -> list[tuple[int, int]]:
    """(count, seed) of every chunk of `part` i of n. A column's chunks do not depend on how it is split."""
    left: int = getattr(kind, column)
    out = []
    while left > 0:
        out.append((min(left, kind.chunk), seed + len(out)))
        left -= kind.chunk
    index, n_parts = part
    return out[index - 1 :: n_parts]
