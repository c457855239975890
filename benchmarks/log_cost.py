"""What it costs that every token is durable before it is streamed. One JSON line last.

Two daemons run side by side, one of them in `unlogged_daemon.py`, which writes prompts and revisions but no token in
between. The same greedy turns go to the one and to the other in turn (ABBA), one session at a time and several at once.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _bench import Conditions, alternating, arguments, console, data_folder, print_json, ratios, spread
from _daemon import DaemonProcess
from _turns import run_turn

from sessiond.clients import Client

QUESTION = "Tell me a long story about a lighthouse keeper and the sea."
out = console()


class UnloggedDaemon(DaemonProcess):
    """The daemon without the writes that are measured."""

    def __init__(self, data_dir: Path, *flags: str, model: str) -> None:
        super().__init__(data_dir, *flags, model=model)
        script = str(Path(__file__).with_name("unlogged_daemon.py"))
        self._command = [sys.executable, script, *self._command[self._command.index("serve") :]]


def throughput(client: Client, n_sessions: int, n_tokens: int) -> float:
    """Tokens per second of `n_sessions` turns at once, from sending the first to the end of the last."""
    sessions = [client.create_session(system="You are a storyteller.") for _ in range(n_sessions)]
    bias = {2: -100.0, 0: -100.0}  # no answer ends by itself
    with ThreadPoolExecutor(n_sessions) as pool:
        began = time.perf_counter()
        turns = list(
            pool.map(lambda session: run_turn(session, QUESTION, max_tokens=n_tokens, logit_bias=bias), sessions)
        )
        seconds = time.perf_counter() - began
    for session in sessions:
        session.delete(purge_now=True)
    if any(len(turn.token_ids) != n_tokens for turn in turns):
        raise RuntimeError("a turn ended before it had generated all it was asked for")
    return n_sessions * n_tokens / seconds


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    figures = {}
    with data_folder("log", out) as folder:
        conditions = Conditions(folder)
        with (
            DaemonProcess(folder / "logged", model=options.model) as logged,
            UnloggedDaemon(folder / "unlogged", model=options.model) as unlogged,
        ):
            clients = {"on": logged.client(), "off": unlogged.client()}
            for n_sessions in (1, 8):
                speed: dict[str, list[float]] = {"on": [], "off": []}
                for repeat in range(options.repeats + 1):
                    order = ("on", "off") if alternating(repeat) else ("off", "on")
                    for name in order:
                        measured = throughput(clients[name], n_sessions, options.tokens // n_sessions)
                        if repeat:  # the first one warms up
                            speed[name].append(measured)
                figures[n_sessions] = {
                    "ratio": spread(ratios(speed["on"], speed["off"])),
                    **{f"tokens_per_second_{name}": spread(values) for name, values in speed.items()},
                }
                out.print(f"{n_sessions} sessions: with the log {figures[n_sessions]['ratio']} of without")
    print_json(
        {
            "benchmark": "log_cost",
            "log_throughput_ratio": figures[1]["ratio"]["median"],
            "log_throughput_ratio_8": figures[8]["ratio"]["median"],
            "spreads": {
                "log_throughput_ratio": figures[1]["ratio"],
                "log_throughput_ratio_8": figures[8]["ratio"],
                **{f"tokens_per_second_{n}": figures[1][f"tokens_per_second_{n}"] for n in ("on", "off")},
            },
            "repeats": options.repeats,
            "tokens": options.tokens,
            **conditions.told(),
        }
    )


if __name__ == "__main__":
    main()
