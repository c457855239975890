"""Decoding and prefill against transformers' own `generate`, in one run. One JSON line last.

Us: a daemon in a process of its own, through gRPC, with everything a user's turn does - each token is durable before it
is streamed. Peer: `generate` with its DynamicCache and default attention (sdpa) in this process. Both run the same bf16
weights on the same tokens with the same number of threads, which spin as long, greedily, one session; never both at
once, alternately (ABBA). A turn begins with nothing computed: its time to first token is the prefill, the time between
its first and last token the decoding at that context. Every repeat takes another stretch of text, so that nothing can
be shared.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _bench import (
    Conditions,
    agreeing_prefix,
    alternating,
    arguments,
    console,
    data_folder,
    median,
    print_json,
    ratios,
    spin_as_the_daemon,
    spread,
)
from _daemon import DaemonProcess
from _turns import prose, run_turn, token_ms, wait_settled
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from sessiond import modelstore
from sessiond.clients import Client
from sessiond.template import ChatTemplate

PREFILL_CONTEXT = 8000
out = console()


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn: prefill of the context, then decoding on top of it."""

    prefill_ms: float
    token_ms: float
    token_ids: list[int]


@dataclass(slots=True)
class Pairs:
    """Turns of both at one context, in the order of the repeats."""

    ours: list[Sample] = field(default_factory=list)
    peer: list[Sample] = field(default_factory=list)

    def ratios(self, what: str) -> list[float]:
        """How many times longer the peer takes."""
        return ratios([getattr(s, what) for s in self.peer], [getattr(s, what) for s in self.ours])

    def agreeing(self) -> list[int]:
        """Greedy tokens that agree before the first that differs."""
        return [agreeing_prefix(a.token_ids, b.token_ids) for a, b in zip(self.ours, self.peer, strict=True)]


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token comes; `generate` hands over the prompt first."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.arrivals: list[tuple[float, int]] = []
        self.token_ids: list[int] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.token_ids += value.flatten().tolist()
        self.arrivals.append((time.perf_counter() - self.began, len(self.token_ids)))

    def end(self) -> None:
        """Nothing to do."""


class Peer:
    """transformers as its authors intend it: `generate`, cache on, inference mode, bf16."""

    def __init__(self, path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        eos: int | list[int] | None = self._model.generation_config.eos_token_id
        self.eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self._model.generation_config.eos_token_id = None  # decode as many tokens as were asked for
        self.attention = str(self._model.config._attn_implementation)

    @torch.inference_mode()
    def run(self, ids: list[int], n_tokens: int) -> Sample:
        prompt = torch.tensor([ids])
        clock = Clock()
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n_tokens,
            do_sample=False,
            use_cache=True,
            streamer=clock,
        )
        return Sample(clock.arrivals[0][0] * 1e3, token_ms(clock.arrivals), clock.token_ids)


class Ours:
    """The daemon, asked as a client asks."""

    def __init__(self, client: Client, stop_ids: list[int]) -> None:
        self._client = client
        self._no_end = dict.fromkeys(stop_ids, -100.0)  # decode as many tokens as were asked for
        self._cell_tokens = client.server_info().cell_tokens

    def run(self, ids: list[int], n_tokens: int) -> Sample:
        session = self._client.create_session(token_ids=ids[:1])
        turn = run_turn(session, token_ids=ids[1:], max_tokens=n_tokens, logit_bias=self._no_end)
        if turn.computed != len(ids):
            raise RuntimeError(f"{turn.computed} of {len(ids)} tokens were computed: the prefill is not comparable")
        # What goes on behind a turn must be over before the peer is timed.
        wait_settled(session, self._cell_tokens)
        session.delete(purge_now=True)
        return Sample(turn.ttft_ms, turn.token_ms, turn.token_ids)


def measure(ours: Ours, peer: Peer, text: list[int], context: int, n_tokens: int, repeats: int) -> Pairs:
    pairs = Pairs()
    for repeat in range(repeats):
        start = (repeat * (context + 97)) % (len(text) - context)
        ids = text[start : start + context]
        runs = [(ours, pairs.ours), (peer, pairs.peer)]
        for runner, samples in runs if alternating(repeat) else reversed(runs):
            sample = runner.run(ids, n_tokens)
            check_length(sample, n_tokens)
            samples.append(sample)
        a, b = pairs.ours[-1], pairs.peer[-1]
        out.print(
            f"{context:>5} tokens, repeat {repeat + 1:>2} of {repeats}: "
            f"decode {a.token_ms:7.2f} ms a token, transformers {b.token_ms:7.2f}; "
            f"prefill {a.prefill_ms:9.1f} ms, transformers {b.prefill_ms:9.1f}"
        )
    return pairs


def report(results: dict[int, Pairs]) -> dict[str, Any]:
    """The table, and the part of the JSON object that holds figures."""
    table = Table(title="Times the peer takes of ours: median (quartiles)")
    for name in ("context", "decode, ms/token", "transformers", "ratio", "prefill, ms", "transformers", "ratio"):
        table.add_column(name, justify="right")
    figures: dict[str, Any] = {}
    spreads: dict[str, Any] = {}
    for context, pairs in results.items():
        cells = []
        for what, name in (("token_ms", "decode"), ("prefill_ms", "prefill")):
            found = spread(pairs.ratios(what))
            figure = f"{name}_vs_transformers_{context}"
            figures[figure], spreads[figure] = found["median"], found
            for who in ("ours", "peer"):
                values = [getattr(sample, what) for sample in getattr(pairs, who)]
                spreads[f"{name}_{what.partition('_')[0]}_ms_{who}_{context}"] = spread(values)
                cells.append(f"{median(values):,.2f}")
            cells.append(f"{found['median']}x ({found['q1']}-{found['q3']})")
        table.add_row(f"{context:,}", *cells)
    out.print(table)
    return {**figures, "spreads": spreads}


def check_length(sample: Sample, n_tokens: int) -> None:
    """Raises RuntimeError unless as many tokens were decoded as were asked for."""
    if len(sample.token_ids) != n_tokens:
        raise RuntimeError(f"{len(sample.token_ids)} of {n_tokens} tokens were decoded: the times are not comparable")


def check(results: dict[int, Pairs]) -> dict[str, float]:
    """No speed without agreement. bf16 sums differ in order, so a near tie may part two runs later on."""
    agreement = {str(context): median(pairs.agreeing()) for context, pairs in results.items()}
    firsts = [n > 0 for pairs in results.values() for n in pairs.agreeing()]
    if sum(firsts) < 0.5 * len(firsts):
        raise RuntimeError(f"only {sum(firsts)} of {len(firsts)} first tokens agree: not the same computation")
    return agreement


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, PREFILL_CONTEXT])
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode in each repeat")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each, the daemon and the peer")
    options = parser.parse_args()
    spin_as_the_daemon()
    path = modelstore.resolve(options.model).path
    transformers_logging.disable_progress_bar()
    peer = Peer(path, options.threads)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    text = tokenizer.encode(prose(), add_special_tokens=False)
    with data_folder("bench", out, f"; {options.threads} threads each; one warm-up turn of each first") as folder:
        conditions = Conditions(folder)
        with DaemonProcess(folder / "data", "--threads", str(options.threads), model=options.model) as daemon:
            ours = Ours(daemon.client(), sorted(ChatTemplate(tokenizer, peer.eos_ids).stop_ids))
            for runner in (ours, peer):
                runner.run(text[-256:], 8)
            results = {
                context: measure(ours, peer, text, context, options.tokens, options.repeats)
                for context in sorted(options.contexts)
            }
    agreement = check(results)
    figures = report(results)
    print_json(
        {
            "benchmark": "decode",
            **figures,
            "agreeing_greedy_tokens": agreement,
            "repeats": options.repeats,
            "decoded_tokens": options.tokens,
            "threads": options.threads,
            "dtype": "bfloat16",
            "ours": "daemon in its own process, through gRPC",
            "peer": f"transformers generate, DynamicCache, {peer.attention}, in this process",
            "order": "alternating (ABBA), never both at once",
            **conditions.told(),
        }
    )


if __name__ == "__main__":
    main()
