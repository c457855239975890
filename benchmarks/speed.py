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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from _bench import Conditions, arguments, console, data_folder, median, print_json, rounded, spin_as_the_daemon
from _contender import Contender
from _daemon import DaemonProcess
from _floors import WEIGHT_SHARE, Floors, kv_bytes, weight_bytes
from _peers_llama import PINNED, LlamaServer
from _peers_transformers import TransformersPeer
from _speed_ours import Ours
from _speed_phases import Field, Measured, Text, batch, decode, own_code, prefill, stall
from _speed_report import SPARSE, agreement, figures_of, lines_of, spreads_of
from _turns import prose
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from sessiond import modelstore
from sessiond.config import Settings
from sessiond.template import ChatTemplate

PHASES = ("decode", "prefill", "batch", "stall", "own")
DEFAULT_WEIGHTS = "int4"
SLOT_ROOM = 256  # tokens of a slot of llama-server beyond prompt and answer
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


class Run:
    """One run: the model, the text, and what was measured so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.path = modelstore.resolve(options.model).path
        tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        eos = GenerationConfig.from_pretrained(self.path).eos_token_id
        self.stop_ids = sorted(ChatTemplate(tokenizer, eos if isinstance(eos, list) else [eos]).stop_ids)
        self.text = Text(tokenizer.encode(prose(), add_special_tokens=False))
        self.max_context = int(AutoConfig.from_pretrained(self.path).get_text_config().max_position_embeddings)
        self.measured, self.floors = Measured(), Floors()
        self.weights: list[str] = options.weights or ([DEFAULT_WEIGHTS] if "weights" in Settings.model_fields else [""])
        self.ours: list[Ours] = []
        self.transformers: TransformersPeer | None = None

    @property
    def names(self) -> dict[str, str]:
        """Our daemons, with the suffix of their figures."""
        rest = {f"ours_{weights}": f"_{weights}" for weights in self.weights[1:]}
        return {"ours": "", **rest}

    @contextmanager
    def started(self) -> Iterator[None]:
        """Our daemons and transformers, which idle through the whole run when they are not asked."""
        with ExitStack() as stack:
            for name, weights in zip(self.names, self.weights, strict=True):
                flags = ["--threads", str(self.options.threads), *(["--weights", weights] if weights else [])]
                daemon = DaemonProcess(self.folder / name, *flags, model=self.options.model)
                self.ours.append(Ours(name, stack.enter_context(daemon), self.stop_ids))
            if "transformers" not in self.options.without:
                self.transformers = stack.enter_context(TransformersPeer(self.path, self.options.threads))
            yield

    @contextmanager
    def field(self, n_slots: int, slot_tokens: int) -> Iterator[Field]:
        """All contenders, with a llama-server of so many slots; the bounds are measured once more."""
        self.floors.sample()
        contenders: list[Contender] = [*self.ours, *([self.transformers] if self.transformers else [])]
        with ExitStack() as stack:
            if "llama" not in self.options.without:
                gguf = modelstore.fetch(self.options.model)
                size = self.options.threads, n_slots, slot_tokens
                contenders.insert(1, stack.enter_context(LlamaServer(gguf, self.folder / "llama.log", *size)))
            yield Field(contenders, self.measured, out.print)

    def prompt_tokens(self, context: int) -> int:
        """Tokens of the prompt that stands for a context: the longest leaves room for the answer."""
        return min(context, self.max_context - self.options.tokens - 8)

    def alone(self) -> None:
        """One session: prefill and decoding at every context; transformers' long prefill is no figure, and left out."""
        options, longest = self.options, max(self.options.contexts)
        with self.field(1, min(self.max_context, longest + options.tokens + SLOT_ROOM)) as field:
            without = Field([one for one in field.contenders if one.name != "transformers"], self.measured, field.say)
            for context in sorted(options.contexts):
                n_tokens = self.prompt_tokens(context)
                if "prefill" in options.phases:
                    repeats = options.prefill_repeats if context == longest else options.repeats
                    prefill(without if context == longest else field, context, self.text, n_tokens, repeats)
                if "decode" in options.phases:
                    policies = SPARSE if context == longest else ()
                    ids = self.text.take(n_tokens)
                    decode(field, context, ids, options.tokens, options.repeats, policies)
            field.check_rest()

    def many(self) -> None:
        """Many sessions at once."""
        options, most = self.options, max(self.options.sessions)
        with self.field(most, options.batch_context + options.tokens + SLOT_ROOM) as field:
            field.hold({number: self.text.take(options.batch_context) for number in range(most)})
            if "batch" in options.phases:
                batch(field, sorted(options.sessions), options.tokens, options.repeats)
            field.check_rest()
            if "stall" in options.phases:
                stall(field, most - 1, self.text, options.stall_tokens, options.tokens, options.prefill_repeats)
            field.release()

    def share(self) -> None:
        options = self.options
        n_tokens = min(512, options.batch_context)
        field = Field(self.ours, self.measured, out.print)
        field.hold({number: self.text.take(n_tokens) for number in range(options.own_sessions)})
        own_code(field, options.own_sessions, 2 * options.tokens, options.repeats)
        field.release()


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
