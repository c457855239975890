"""How far each policy's answers are from full attention's. Markdown on the terminal, one JSON line last.

Conversations are replayed token by token over a long history that all policies share (prefilled once, with full
attention), so nothing diverges; the reference is our own full attention over the same KV. `chunking` is the floor: full
attention over a history that was computed in other pieces. `oracle` knows all weights, `random` none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _bench import arguments, console, machine, print_json, spin_as_the_daemon, today
from _chat_text import conversations
from _model import load_model
from _references import Oracle, Random
from _replay import Distance, prefill, replay

from sessiond import modelstore
from sessiond.cache import SessionCache
from sessiond.model import Model, load_tokenizer
from sessiond.policies.base import Policy
from sessiond.policies.full import Full
from sessiond.policies.registry import parse
from sessiond.selection import Selection

PROMPT = 32  # tokens of the last user message: what the methods observe
out = console()


def policies(budget: int) -> dict[str, Policy]:
    """Every method attending to about `budget` tokens of history, and what it is measured against."""
    return {
        "oracle": Oracle(budget),
        "sieve": parse("sieve", {"least": budget, "most": budget}),
        "sieve_2bit": parse("sieve", {"least": budget, "most": budget, "bits": 2}),
        "rocketkv": parse("rocketkv", {"budget": 2 * budget}),
        "quest": parse("quest", {"budget": budget}),
        "snapkv": parse("snapkv", {"budget": budget}),
        "adakv": parse("adakv", {"budget": budget}),
        "h2o": parse("h2o", {"budget": budget, "recent": budget // 2}),
        "window": parse("window", {"sinks": 4, "recent": budget - 4}),
        "random": Random(budget),
    }


@dataclass
class Result:
    distance: Distance = field(default_factory=Distance)
    attended: list[float] = field(default_factory=list)  # shares of the history, by layer and step
    seconds: float = 0.0


@contextlib.contextmanager
def counting(attended: list[float]) -> Iterator[None]:
    """Note what share of the history each layer attends to in each decoded step."""
    choose = Selection.choose

    def counted(self: Selection, *args: Any, decoding: bool) -> Any:
        chosen = choose(self, *args, decoding=decoding)
        if decoding:
            kept = self.turn_start if chosen is None else float((chosen.positions >= 0).sum(-1).float().mean())
            attended.append(kept / self.turn_start)
        return chosen

    with mock.patch.object(Selection, "choose", counted):
        yield


def measure(
    model: Model, ids: list[int], n_context: int, chosen: dict[str, Policy], results: dict[str, Result]
) -> None:
    """One conversation: `n_context` tokens, the last PROMPT of them the turn's prompt, then the answer."""
    history = n_context - PROMPT
    prompt, answer = ids[history:n_context], ids[n_context:]
    cache = model.new_cache()
    prefill(model, cache, ids[:history])
    reference = replay(model, cache, Full(), history, prompt, answer)
    for name, policy in chosen.items():
        began = time.perf_counter()
        with counting(results[name].attended):
            logits = replay(model, cache, policy, history, prompt, answer)
        results[name].seconds += time.perf_counter() - began
        results[name].distance.add(reference, logits, answer)
    other: SessionCache = model.new_cache()
    prefill(model, other, ids[:history], chunk=96)
    results["chunking"].distance.add(reference, replay(model, other, Full(), history, prompt, answer), answer)


def table(told: dict[str, dict[str, Any]]) -> str:
    columns = ("kl_mean", "kl_median", "kl_p95", "kl_p99", "kl_max", "top1", "top1_decided", "delta_nll", "attended")
    rows = ["| policy | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, found in told.items():
        cells = ["-" if found[c] is None else f"{found[c]:.4f}" for c in columns]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="folder with mtbench101.jsonl; without it, made-up sentences")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--answer", type=int, default=96, help="tokens scored in each conversation")
    parser.add_argument("--share", type=float, default=0.06, help="of the history that is attended to")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    spin_as_the_daemon()
    model = load_model(options.model)
    chosen = policies(round(options.share * options.context) // 2 * 2)
    results = {name: Result() for name in [*chosen, "chunking"]}
    tokenizer = load_tokenizer(modelstore.resolve(options.model).path)
    n_tokens = options.context + options.answer
    texts = conversations(tokenizer, options.data, options.conversations, n_tokens, options.seed)
    with torch.inference_mode():
        for number, ids in enumerate(texts):
            measure(model, ids, options.context, chosen, results)
            out.print(f"conversation {number + 1} of {len(texts)}")
    told = {}
    for name, result in results.items():
        share = sum(result.attended) / len(result.attended) if result.attended else 1.0
        told[name] = {**result.distance.told(), "attended": share, "seconds": result.seconds}
    out.print(table(told), markup=False, soft_wrap=True)
    figures = {
        f"kl_{part}_{name}": told[name][f"kl_{part}"] for name in ("sieve", "rocketkv") for part in ("mean", "p99")
    }
    print_json(
        {
            "benchmark": "fidelity",
            **figures,
            "kl_sieve_over_oracle": told["sieve"]["kl_mean"] / told["oracle"]["kl_mean"],
            "policies": told,
            "dtype": str(model.module.dtype).removeprefix("torch."),
            "context": options.context,
            "conversations": options.conversations,
            "answer": options.answer,
            "seed": options.seed,
            "data": "mtbench101" if options.data else "made up",
            "date": today(),
            "machine": machine(),
        }
    )


if __name__ == "__main__":
    main()
