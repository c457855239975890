"""Speed against transformers and llama-server, all through their real interfaces, in one run. One JSON line last.

Us: `sessiond serve` through gRPC, with everything a user's turn does. llama-server: a PyPI wheel in an environment of
its own, on the CPU alone, the same GGUF, through HTTP. transformers: `generate` and `generate_batch` in a process of
its own, bf16. One driver asks them in turn (ABBA), never two at once, each with the same number of threads, greedily,
with the same tokens in and as many tokens out. Prompts are computed once and held where decoding is measured; a
context counts the prompt's tokens, the longest leaving room for what is decoded.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from _bench import Conditions, arguments, console, data_folder, median, print_json, rounded, spin_as_the_daemon
from _floors import WEIGHT_SHARE, kv_bytes, weight_bytes
from _peers_llama import PINNED
from _speed_report import agreement, figures_of, lines_of, spreads_of
from _speed_run import Run
from rich.table import Table

PHASES = ("decode", "prefill", "batch", "stall", "own")
out = console()


def parser() -> argparse.ArgumentParser:
    found = arguments(__doc__)
    found.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    found.add_argument("--tokens", type=int, default=48, help="tokens to decode in each repeat")
    found.add_argument("--repeats", type=int, default=10)
    found.add_argument("--prefill-repeats", type=int, default=3, help="of the longest context's prefill, and of stalls")
    found.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16], help="that decode at once")
    found.add_argument("--batch-context", type=int, default=2048)
    found.add_argument("--stall-tokens", type=int, default=8000, help="prefilled while others decode")
    found.add_argument("--own-sessions", type=int, default=32, help="of 512 tokens, for the share of own code")
    found.add_argument(
        "--weights",
        nargs="+",
        default=[],
        choices=sorted(WEIGHT_SHARE),
        help="of our daemons; figures of the first have plain names",
    )
    found.add_argument("--without", nargs="+", default=[], choices=["llama", "transformers"])
    found.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    found.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each contender")
    found.add_argument("--plots", type=Path, help="folder for pictures; they need the extra plot")
    found.add_argument("--quick", action="store_true", help="one repeat of short contexts: says whether it all runs")
    return found


def shorten(options: argparse.Namespace) -> None:
    """What --quick means."""
    options.contexts, options.tokens, options.repeats, options.prefill_repeats = [96, 192], 12, 1, 1
    options.sessions, options.batch_context, options.stall_tokens, options.own_sessions = [1, 2], 128, 300, 3


def report(run: Run) -> dict[str, Any]:
    """The table, and the part of the JSON object that holds figures."""
    values = run.measured.values
    figures: dict[str, float] = {}
    told: dict[str, dict[str, Any]] = {"intervals_95": {}, "ratios_of_medians": {}, "agreeing_first_tokens": {}}
    for name, suffix in run.names.items():
        told["agreeing_first_tokens"][name] = agreement(run.measured.answers, name)
        found = figures_of(values, name, suffix)
        figures |= found.figures
        told["intervals_95"] |= found.intervals
        told["ratios_of_medians"] |= found.of_medians
    table = Table(title="Medians (95% confidence); ratios above 1: ours is faster")
    for column in ("figure", "median", "ratio of medians"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for figure, value in figures.items():
        low, high = told["intervals_95"][figure]
        table.add_row(figure, f"{value} ({low}-{high})", str(told["ratios_of_medians"].get(figure, "")))
    out.print(table)
    return {"benchmark": "speed", **figures, **told, "spreads": spreads_of(values), "bounds": bounds(run)}


def bounds(run: Run) -> dict[str, float]:
    """What the machine can do, and the shares of our decode steps that reading weights and KV once would take."""
    told = run.floors.told()
    for name, weights in zip(run.names, run.weights, strict=True):
        read_once = weight_bytes(run.options.model, run.path, weights)
        for context in run.options.contexts:
            taken = run.measured.values.get(f"decode_ms_{context}", {}).get(name)
            if taken:
                n_bytes = read_once + kv_bytes(run.path, run.prompt_tokens(context))
                floor_ms = n_bytes / told["read_gb_per_s"] / 1e6
                told[f"decode_floor_ms_{context}{run.names[name]}"] = rounded(floor_ms)
                told[f"decode_floor_share_{context}{run.names[name]}"] = rounded(floor_ms / median(taken))
    return told


def draw(run: Run, folder: Path) -> None:
    from _plots import speed

    for kind, x, y in (
        ("decode_ms", "tokens of context", "tokens a second, one session"),
        ("throughput", "sessions decoding at once", "tokens a second in all"),
    ):
        lines = lines_of(run.measured.values, kind)
        if lines:
            out.print(f"drawn: {speed(lines, x, y, folder / f'speed_{kind}.png')}")


def main() -> None:
    options = parser().parse_args()
    if options.quick:
        shorten(options)
    spin_as_the_daemon()
    torch.set_num_threads(options.threads)
    with data_folder("bench", out, f"; {options.threads} threads each") as folder:
        conditions = Conditions(folder)
        run = Run(options, folder)
        with run.started():
            if {"prefill", "decode"} & set(options.phases):
                run.alone()
            if {"batch", "stall"} & set(options.phases):
                run.many()
            if "own" in options.phases:
                run.share()
    told = report(run)
    if options.plots:
        draw(run, options.plots)
    facts = {
        "weights": dict(zip(run.names, run.weights, strict=True)),
        "peers": {"llama": PINNED, "transformers": run.transformers.facts if run.transformers else None},
        "prompt_tokens": {str(context): run.prompt_tokens(context) for context in options.contexts},
        "repeats": options.repeats,
        "prefill_repeats": options.prefill_repeats,
        "decoded_tokens": options.tokens,
        "threads": options.threads,
        "idle_cpu_share": run.measured.idle_shares(),
        "order": "alternating (ABBA), never two at once",
    }
    print_json({**told, **facts, **conditions.told()})


if __name__ == "__main__":
    main()
