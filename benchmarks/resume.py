"""Time to first token after a restart against computing everything, and against the floor. One JSON line last.

One session of some 6,000 tokens is made once; two copies of its data directory are kept, one left by SIGKILL and one by
SIGTERM. Each repeat takes the one or the other, in turn, and measures side by side (ABBA):

    resume    a daemon is started on a fresh copy; its first request is a short third question in that session
    prefill   a daemon is started on an empty directory; its first request is the very same tokens in a new session
    floor     with no daemon, the same blocks are read and decoded, and as many new tokens computed (resume_floor.py)

Start-up is no part of a time to first token. Files were just written: the page cache is warm, unless --cold has it
dropped before every resume. Then, once: kv_identity.py and grpc_overhead.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _bench import (
    Conditions,
    alternating,
    arguments,
    console,
    data_folder,
    median,
    print_json,
    ratios,
    rounded,
    run_script,
    spread,
)
from _daemon import DaemonProcess, copy_data, drop_page_cache
from _store import open_longest
from _turns import (
    FIRST_QUESTION,
    SECOND_QUESTION,
    SYSTEM,
    THIRD_QUESTION,
    Turn,
    document,
    run_turn,
    wait_settled,
)
from rich.table import Table

from sessiond.clients import Session
from sessiond.v1 import types_pb2

MAX_TOKENS = 8
out = console()


@dataclass(frozen=True, slots=True)
class Prepared:
    """The session, its two data directories, and what its third turn consists of.

    `history` and `prompt`: its tokens, and those of the third question as the template puts it. `restorable`: tokens
    whose KV is on disk. `answer`: the third turn's greedy tokens.
    """

    session_id: str
    killed: Path
    drained: Path
    history: list[int]
    prompt: list[int]
    restorable: int
    answer: list[int]
    disk: dict[str, float]

    @property
    def n_new(self) -> int:
        return len(self.history) + len(self.prompt) - self.restorable


@dataclass(slots=True)
class Repeats:
    """Milliseconds and tokens, one a repeat."""

    resume_ms: list[float] = field(default_factory=list)
    restore_ms: list[float] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)
    floor_ms: list[float] = field(default_factory=list)
    floor_read_ms: list[float] = field(default_factory=list)
    floor_compute_ms: list[float] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)
    recomputed: list[int] = field(default_factory=list)


def prepare(folder: Path, model: str, n_tokens: int) -> Prepared:
    """Make the session, and the directories that a killed and a drained daemon leave."""
    base = folder / "base"
    with DaemonProcess(base, model=model) as daemon:
        client = daemon.client()
        session = client.create_session(system=SYSTEM)
        text, counted = document(session, n_tokens)
        out.print(f"a session with a document of {counted:,} tokens (CPython's help text) and two turns")
        for question in (f"{text}\n\n{FIRST_QUESTION}", SECOND_QUESTION):
            run_turn(session, question, max_tokens=32)
        wait_settled(session, client.server_info().cell_tokens)
        disk = disk_ratios(client.stats())
        daemon.kill()
    killed = copy_data(base, folder / "killed")
    with DaemonProcess(base, model=model) as daemon:
        daemon.client().session(session.id).warm()
        daemon.terminate()
    drained = copy_data(base, folder / "drained")
    # The third turn once, unmeasured: what it consists of is read from the log it leaves.
    with open_longest(killed) as stored:
        history, restorable = stored.ids.tolist(), stored.persisted
    with DaemonProcess(base, model=model) as daemon:
        run_turn(daemon.client().session(session.id), THIRD_QUESTION, max_tokens=MAX_TOKENS)
        daemon.terminate()
    with open_longest(base) as stored:
        prompt, answer = stored.prompt_and_answer()
    return Prepared(session.id, killed, drained, history, prompt, restorable, answer, disk)


def disk_ratios(stats: Any) -> dict[str, float]:
    """Bytes on disk over bytes of raw KV: coded records in whole pages, indexes, and the files."""
    raw = float(stats.disk.kv_raw_bytes)
    files = stats.disk.log_file_bytes + stats.disk.blocks_file_bytes
    return {
        "disk_bytes_ratio": rounded(stats.gauges["kv_coded_page_bytes"] / raw),
        "disk_index_ratio": rounded(stats.disk.index_bytes / raw),
        "disk_file_ratio": rounded(files / raw),
        "kv_raw_bytes": raw,
        "kv_coded_page_bytes": stats.gauges["kv_coded_page_bytes"],
    }


def resume(prepared: Prepared, folder: Path, model: str, repeat: int, cold: bool, into: Repeats) -> None:
    """The third question, as the first request to a daemon that was just started."""
    source = prepared.drained if repeat % 2 else prepared.killed
    data = copy_data(source, folder / "resumed")
    if cold:
        drop_page_cache(data)
    with DaemonProcess(data, model=model) as daemon:
        client = daemon.client()
        client.wait_ready()  # connects
        # A handle from the id alone: nothing is asked about the session before Generate.
        session = Session(client, types_pb2.Session(session_id=prepared.session_id))
        turn = run_turn(session, THIRD_QUESTION, max_tokens=MAX_TOKENS)
    check_resumed(prepared, turn)
    into.resume_ms.append(turn.ttft_ms)
    into.restore_ms.append(turn.restored.milliseconds if turn.restored else 0.0)
    into.recomputed.append(turn.recomputed)
    into.start_seconds.append(daemon.start_seconds)


def check_resumed(prepared: Prepared, turn: Turn) -> None:
    """Raises RuntimeError unless all that was on disk was reused, and the answer is the one first given."""
    if turn.restored is None or turn.reused < prepared.restorable:
        raise RuntimeError(f"only {turn.reused} of {prepared.restorable} tokens were reused")
    if turn.recomputed:
        raise RuntimeError(f"{turn.recomputed} tokens of the history were computed again, though all were on disk")
    if turn.token_ids != prepared.answer:
        raise RuntimeError(f"the resumed session answers {turn.token_ids}; undisturbed it was {prepared.answer}")


def prefill(prepared: Prepared, folder: Path, model: str, repeat: int, into: Repeats) -> None:
    """The same tokens in a session of an empty directory: nothing can be shared."""
    ids = [*prepared.history, *prepared.prompt]
    with DaemonProcess(folder / f"computed-{repeat}", model=model) as daemon:
        session = daemon.client().create_session(token_ids=ids[:1])
        turn = run_turn(session, token_ids=ids[1:], max_tokens=MAX_TOKENS)
    if turn.computed != len(ids):
        raise RuntimeError(f"{turn.computed} of {len(ids)} tokens were computed: not everything")
    into.prefill_ms.append(turn.ttft_ms)
    into.start_seconds.append(daemon.start_seconds)


def floor(prepared: Prepared, folder: Path, model: str, into: Repeats) -> dict[str, Any]:
    data = copy_data(prepared.killed, folder / "floor")
    found = run_script("resume_floor.py", str(data), "--model", model, "--new-tokens", str(prepared.n_new))
    for name in ("floor_ms", "floor_read_ms", "floor_compute_ms"):
        getattr(into, name).append(found[name])
    return {name: found[name] for name in ("bytes_read", "tokens_restored", "new_tokens", "workers")}


def measure(prepared: Prepared, folder: Path, model: str, n_repeats: int, cold: bool) -> tuple[Repeats, dict[str, Any]]:
    found, facts = Repeats(), {}
    for repeat in range(n_repeats):
        steps = [
            lambda: resume(prepared, folder, model, repeat, cold, found),  # noqa: B023 - called at once
            lambda: prefill(prepared, folder, model, repeat, found),  # noqa: B023
        ]
        for step in steps if alternating(repeat) else reversed(steps):
            step()
        facts = floor(prepared, folder, model, found)
        out.print(
            f"repeat {repeat + 1:>2} of {n_repeats}, after {'SIGTERM' if repeat % 2 else 'SIGKILL'}: "
            f"resume {found.resume_ms[-1]:7.1f} ms, prefill {found.prefill_ms[-1]:8.1f} ms, "
            f"floor {found.floor_ms[-1]:6.1f} ms, start {found.start_seconds[-1]:.2f} s"
        )
    return found, facts


def check_identity(data_dir: Path, model: str) -> dict[str, Any]:
    """Compare the directory's KV (kv_identity.py). Raises RuntimeError where it is not what was computed."""
    found = run_script("kv_identity.py", str(data_dir), "--model", model)
    if not found["resume_kv_identical"]:
        raise RuntimeError(f"restored KV is not what was computed: {found}")
    return found


def report(found: Repeats, disk: dict[str, float], grpc: dict[str, Any]) -> dict[str, Any]:
    """The table, and the part of the JSON object that holds figures. What the runs claim has been checked by now."""
    spreads = {
        "resume_ttft_ratio": spread(ratios(found.prefill_ms, found.resume_ms)),
        "resume_over_floor": spread(ratios(found.resume_ms, found.floor_ms)),
        "start_seconds": spread(found.start_seconds),
    }
    for name in ("resume_ms", "restore_ms", "prefill_ms", "floor_ms", "floor_read_ms", "floor_compute_ms"):
        spreads[name] = spread(getattr(found, name))
    figures = {
        "resume_ttft_ratio": spreads["resume_ttft_ratio"]["median"],
        "resume_over_floor": spreads["resume_over_floor"]["median"],
        "resume_tokens_recomputed": max(found.recomputed),
        "resume_kv_identical": True,
        "disk_bytes_ratio": disk["disk_bytes_ratio"],
        "disk_index_ratio": disk["disk_index_ratio"],
        "disk_file_ratio": disk["disk_file_ratio"],
        "grpc_ttft_overhead_ms": grpc.get("grpc_ttft_overhead_ms"),
        "grpc_token_overhead_ms": grpc.get("grpc_token_overhead_ms"),
        "grpc_floor_ms": grpc.get("grpc_floor_ms"),
        "start_seconds": spreads["start_seconds"]["median"],
    }
    table = Table(title=f"Medians of {len(found.resume_ms)} repeats")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("quartiles", justify="right")
    for name, value in [*figures.items(), *((n, median(getattr(found, n))) for n in spreads if n.endswith("_ms"))]:
        shown = spreads.get(name) or grpc.get(f"{name}_spread")
        quartiles = f"{shown['q1']} - {shown['q3']}" if shown else ""
        table.add_row(name, str(rounded(value)) if isinstance(value, float) else str(value), quartiles)
    out.print(table)
    return {**figures, "same_answer": True, "spreads": spreads}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=6000, help="tokens of the document")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--grpc-repeats", type=int, default=100, help="0: leave that part out")
    parser.add_argument("--cold", action="store_true", help="drop the page cache of the data before every resume")
    options = parser.parse_args()
    page_cache = "cold" if options.cold else "warm"
    with data_folder("bench", out, f"; page cache {page_cache}") as folder:
        conditions = Conditions(folder)
        prepared = prepare(folder, options.model, options.tokens)
        found, facts = measure(prepared, folder, options.model, options.repeats, options.cold)
        out.print("is restored KV what was computed?")
        checks = [
            check_identity(copy_data(source, folder / "checked"), options.model)
            for source in (prepared.killed, prepared.drained)
        ]
    grpc: dict[str, Any] = {}
    if options.grpc_repeats:
        out.print("what gRPC adds")
        grpc = run_script("grpc_overhead.py", "--model", options.model, "--repeats", str(options.grpc_repeats))
    figures = report(found, prepared.disk, grpc)
    print_json(
        {
            "benchmark": "resume",
            **figures,
            "history_tokens": len(prepared.history),
            "floor": facts,
            "disk": prepared.disk,
            "kv_identity": checks,
            "grpc": grpc,
            "repeats": options.repeats,
            "order": "alternating (ABBA); restarts after SIGKILL and SIGTERM in turn",
            "page_cache": page_cache,
            **conditions.told(),
        }
    )


if __name__ == "__main__":
    main()
