"""What a hot session takes of a daemon's memory under each policy, by the kernel's word. One JSON line last.

A daemon makes several sessions that share a long document (one computes it, the others copy), lets each answer two
turns and settle, and tells its proportional set size: the slope over the sessions is what one takes, exact KV, indexes
and all. Pages that only the page cache holds are not the daemon's, nor are those of the store's files. The document is
short enough for small pages.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from _bench import arguments, console, data_folder, machine, print_json, rounded, today
from _daemon import DaemonProcess
from _turns import SYSTEM, document, run_turn, wait_settled

from sessiond import modelstore

POLICIES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "sieve": {"name": "sieve"},
    "shadowkv": {"name": "shadowkv"},
    "int4": {"name": "int4"},
}
MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
out = console()


def resident_bytes(pid: int) -> int:
    """Proportional set size of a process, without the store's own files: what these map is the kernel's to take back.

    Pages of offloaded KV that are mapped count.
    """
    total, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if MAPPING.match(line):
            counts = not line.endswith("data.mdb")
        elif counts and line.startswith("Pss:"):
            total += int(line.split()[1]) << 10
    return total


def settled_bytes(pid: int) -> int:
    """The same, when three looks in a row agree: indexes have caught up, and KV lies in its tier."""
    seen: list[int] = []
    for _ in range(60):
        seen.append(resident_bytes(pid))
        if len(seen) > 2 and max(seen[-3:]) - min(seen[-3:]) < 1 << 20:
            return seen[-1]
        time.sleep(1.0)
    raise RuntimeError("the daemon's memory does not settle")


def kv_bytes(model: str) -> int:
    """Bytes of a token's keys and values in bf16."""
    config = json.loads((modelstore.resolve(model).path / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head_dim * 2)


def session_bytes(daemon: DaemonProcess, policy: dict[str, Any], text: str, n_sessions: int) -> tuple[float, int, int]:
    """Bytes a session takes, its tokens, and what the daemon counts for all of them, the first one left out."""
    client, seen, tokens = daemon.client(), [], 0
    for _ in range(n_sessions + 1):
        session = client.create_session(system=SYSTEM, policy=policy)
        run_turn(session, f"{text}\n\nWhat is this about?", max_tokens=24)
        wait_settled(session, 128)
        run_turn(session, "And what else?", max_tokens=24)
        wait_settled(session, 128)
        time.sleep(1.0)
        tokens = int(session.refresh().proto.token_count)
        seen.append(settled_bytes(daemon.pid))
    return (seen[-1] - seen[0]) / n_sessions, tokens, int(client.stats().memory_bytes_by_tier["device"])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=2500, help="of the shared document")
    parser.add_argument("--sessions", type=int, default=5)
    options = parser.parse_args()
    told: dict[str, Any] = {}
    exact = kv_bytes(options.model)
    with data_folder("hot-bytes", out) as folder:
        for name, policy in POLICIES.items():
            with DaemonProcess(folder / name, model=options.model) as daemon:
                probe = daemon.client().create_session(system=SYSTEM)
                text, _ = document(probe, options.tokens)
                taken, tokens, counted = session_bytes(daemon, policy, text, options.sessions)
            told[name] = {
                "bytes_per_token": rounded(taken / tokens),
                "share_of_bf16_kv": rounded(taken / tokens / exact),
                "counted_share": rounded(counted / (options.sessions + 1) / tokens / exact),
                "tokens": tokens,
            }
            out.print(f"{name}: {told[name]}")
    print_json(
        {
            "benchmark": "hot_bytes",
            "hot_bytes_sieve": told["sieve"]["share_of_bf16_kv"],
            "policies": told,
            "sessions": options.sessions,
            "date": today(),
            "machine": machine(),
        }
    )


if __name__ == "__main__":
    main()
