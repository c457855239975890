"""Forks, edits and shared prefixes of long sessions, and what the durable log costs. One JSON line last.

Everything goes through `sessiond serve` and gRPC:

    fork      of a session of some 8,000 tokens, hot: time of the RPC; bytes of KV that came to be, in memory or on disk
    edit      its last user message is replaced: rollback and a new turn, hot and after SIGKILL; tokens computed beyond
              the new message and the last token of the answer before it, which had only been sampled
    prefix    a second session that begins with the same document of 4,000 tokens, while the first is in memory (live)
              and after SIGKILL (restart): time to first token against the first session's, which computes everything
    log       log_cost.py: tokens per second of two daemons in turn, one of which writes no token before it streams it
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _bench import Conditions, arguments, console, data_folder, print_json, ratios, run_script, spread
from _daemon import DaemonProcess
from _turns import FIRST_QUESTION, SECOND_QUESTION, SYSTEM, THIRD_QUESTION, document, run_turn, wait_settled
from rich.table import Table

from sessiond.clients import Client, Session

MAX_TOKENS = 8
out = console()


@dataclass(slots=True)
class Found:
    """Milliseconds, tokens and bytes, one a repeat."""

    fork_ms: list[float] = field(default_factory=list)
    fork_bytes: list[int] = field(default_factory=list)
    branch_ttft_ms: list[float] = field(default_factory=list)
    edit_recomputed: list[int] = field(default_factory=list)
    edit_ttft_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    live_ms: list[float] = field(default_factory=list)
    restart_ms: list[float] = field(default_factory=list)
    prefix_new: list[int] = field(default_factory=list)


def kv_bytes(client: Client) -> int:
    """Bytes of KV that the daemon holds: in memory, and in records on disk."""
    stats = client.stats()
    return int(sum(stats.memory_bytes_by_tier.values()) + stats.gauges["kv_coded_page_bytes"])


def forks(client: Client, session: Session, n_repeats: int, found: Found) -> None:
    for _ in range(n_repeats):
        before = kv_bytes(client)
        began = time.perf_counter()
        branch = session.fork()
        found.fork_ms.append((time.perf_counter() - began) * 1e3)
        found.fork_bytes.append(kv_bytes(client) - before)
        if found.fork_bytes[-1] < 0:
            raise RuntimeError("KV went away while the session was forked: what was copied cannot be told")
        if branch.proto.token_count != session.refresh().proto.token_count:
            raise RuntimeError("the fork does not hold what its source holds")
        turn = run_turn(branch, THIRD_QUESTION, max_tokens=MAX_TOKENS)
        if turn.recomputed:
            raise RuntimeError(f"the fork's first turn computed {turn.recomputed} tokens of its past again")
        found.branch_ttft_ms.append(turn.ttft_ms)
        branch.delete(purge_now=True)


def edit(session: Session, found: Found) -> list[int]:
    """Replace the last user message; returns the new answer's tokens."""
    last = session.revisions()[-1]
    session.rollback(last.parent_revision_id)
    n_message = int(session.count_tokens(THIRD_QUESTION, add_generation_prompt=True).tokens)
    turn = run_turn(session, THIRD_QUESTION, max_tokens=MAX_TOKENS)
    # The answer before it: its last token was sampled and never fed, so whoever goes on from there computes it first.
    found.edit_recomputed.append(max(0, turn.computed - n_message - 1) + turn.recomputed)
    found.edit_ttft_ms.append(turn.ttft_ms)
    return turn.token_ids


def long_session(folder: Path, model: str, n_tokens: int, n_repeats: int, found: Found) -> int:
    """Forks and edits of one session; returns its length."""
    with DaemonProcess(folder / "long", model=model) as daemon:
        client = daemon.client()
        cell_tokens = client.server_info().cell_tokens
        session = client.create_session(system=SYSTEM)
        text, _ = document(session, n_tokens)
        run_turn(session, f"{text}\n\n{FIRST_QUESTION}", max_tokens=32)
        run_turn(session, SECOND_QUESTION, max_tokens=32)
        wait_settled(session, cell_tokens)
        length = int(session.refresh().proto.token_count)
        out.print(f"a session of {length:,} tokens")
        forks(client, session, n_repeats, found)
        answer = edit(session, found)
        wait_settled(session, cell_tokens)
        daemon.kill()
    with DaemonProcess(folder / "long", model=model) as daemon:
        session = daemon.client().session(session.id)
        if edit(session, found) != answer:
            raise RuntimeError("edited after SIGKILL, the session answers otherwise")
    return length


def prefixes(folder: Path, model: str, n_tokens: int, repeat: int, found: Found) -> None:
    """Three sessions that begin alike: the first computes, the others take over."""
    data = folder / f"prefix-{repeat}"
    with DaemonProcess(data, model=model) as daemon:
        client = daemon.client()
        sessions = [client.create_session(system=SYSTEM) for _ in range(3)]
        text, counted = document(sessions[0], n_tokens)
        first = run_turn(sessions[0], f"{text}\n\n{FIRST_QUESTION}", max_tokens=MAX_TOKENS)
        if first.reused or first.computed < counted:
            raise RuntimeError(f"the first session found {first.reused} tokens computed")
        live = run_turn(sessions[1], f"{text}\n\n{SECOND_QUESTION}", max_tokens=MAX_TOKENS)
        cell_tokens = client.server_info().cell_tokens
        wait_settled(sessions[0], cell_tokens)
        daemon.kill()
    with DaemonProcess(data, model=model) as daemon:
        session = daemon.client().session(sessions[2].id)
        restart = run_turn(session, f"{text}\n\n{THIRD_QUESTION}", max_tokens=MAX_TOKENS)
    for turn in (live, restart):
        if turn.computed > cell_tokens or turn.recomputed:
            raise RuntimeError(f"a session computed {turn.computed} tokens of a document that was computed before")
        found.prefix_new.append(turn.computed)
    found.first_ms.append(first.ttft_ms)
    found.live_ms.append(live.ttft_ms)
    found.restart_ms.append(restart.ttft_ms)
    out.print(
        f"repeat {repeat + 1:>2}: first {first.ttft_ms:7.1f} ms, live {live.ttft_ms:6.1f} ms, "
        f"restart {restart.ttft_ms:6.1f} ms; {live.computed} and {restart.computed} tokens computed"
    )


def report(found: Found, log: dict[str, Any]) -> dict[str, Any]:
    spreads = {
        "fork_ms": spread(found.fork_ms),
        "branch_ttft_ms": spread(found.branch_ttft_ms),
        "edit_ttft_ms": spread(found.edit_ttft_ms),
        "prefix_ttft_ratio_live": spread(ratios(found.first_ms, found.live_ms)),
        "prefix_ttft_ratio_restart": spread(ratios(found.first_ms, found.restart_ms)),
        "prefix_first_ms": spread(found.first_ms),
        "prefix_live_ms": spread(found.live_ms),
        "prefix_restart_ms": spread(found.restart_ms),
    }
    figures = {
        "fork_ms": spreads["fork_ms"]["median"],
        "fork_bytes_copied": max(found.fork_bytes),
        "edit_tokens_recomputed": max(found.edit_recomputed),
        "prefix_ttft_ratio_live": spreads["prefix_ttft_ratio_live"]["median"],
        "prefix_ttft_ratio_restart": spreads["prefix_ttft_ratio_restart"]["median"],
        "prefix_tokens_computed": max(found.prefix_new),
        **({"log_throughput_ratio": log["log_throughput_ratio"]} if log else {}),
    }
    table = Table(title="Medians")
    for column in ("figure", "value", "quartiles"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, value in figures.items():
        shown = spreads.get(name) or log.get("spreads", {}).get(name)
        table.add_row(name, str(value), f"{shown['q1']} - {shown['q3']}" if shown else "")
    out.print(table)
    return {**figures, "spreads": spreads}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=7900, help="tokens of the long session's document")
    parser.add_argument("--prefix-tokens", type=int, default=4000, help="tokens of the shared document")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--log-repeats", type=int, default=10, help="0: leave that part out")
    options = parser.parse_args()
    found = Found()
    with data_folder("branches", out) as folder:
        conditions = Conditions(folder)
        length = long_session(folder, options.model, options.tokens, options.repeats, found)
        for repeat in range(options.repeats):
            prefixes(folder, options.model, options.prefix_tokens, repeat, found)
    log: dict[str, Any] = {}
    if options.log_repeats:
        out.print("what the log costs")
        log = run_script("log_cost.py", "--model", options.model, "--repeats", str(options.log_repeats))
    figures = report(found, log)
    print_json(
        {
            "benchmark": "branches",
            **figures,
            "session_tokens": length,
            "prefix_tokens": options.prefix_tokens,
            "log": log,
            "repeats": options.repeats,
            **conditions.told(),
        }
    )


if __name__ == "__main__":
    main()
