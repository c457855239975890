"""How far each policy's answers are from full attention's. Markdown on the terminal, one JSON line last.

Conversations are replayed token by token over a long history that all policies share (prefilled once, with full
attention), so nothing diverges; the reference is our own full attention over the same KV. `chunking` is the floor: full
attention over a history that was computed in other pieces. `oracle` knows all weights, `random` none. Turns before the
last one stand at smaller depths, with the same budget; the figures proper are those of the last turn. The first token
of an answer is not scored: its logits come from the prompt, which most policies let attend to everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, console, machine, print_json, spin_as_the_daemon, today
from _chat_text import conversations
from _contenders import contenders, only
from _grades import grade
from _kvpress_rows import peer
from _model import load_model
from _probe import Probe
from _replay import Contender, Distance, prefill
from _scoring import score_history

from sessiond import modelstore
from sessiond.cache import SessionCache
from sessiond.model import Model, load_tokenizer
from sessiond.policies.base import Policy
from sessiond.policies.full import Full

PROMPT = 32  # tokens of a turn's user message: what the methods observe
COLUMNS = ("kl_mean", "kl_median", "kl_p95", "kl_p99", "kl_max", "top1", "top1_decided", "delta_nll")
INSIDE = ("attended", "mass_mean", "mass_worst", "error_mean", "error_p99")
BYTES = ("index_bytes_per_token", "kv_bytes_per_step", "form_bytes_per_step", "scan_bytes_per_step")
out = console()


@dataclass
class Result:
    """Of one policy: its distance in the last turn of all conversations, and in each turn by itself."""

    contender: Contender
    last: Distance = field(default_factory=Distance)
    turns: dict[int, Distance] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        by_turn = [(depth, d.told()) for depth, d in sorted(self.turns.items())]
        return {
            **self.last.told(),
            **self.contender.told(),
            "by_depth": [
                {"depth": depth, **{k: found[k] for k in ("kl_mean", "kl_p99", "top1_decided", "n")}}
                for depth, found in by_turn
            ],
        }


def depths(context: int, turns: int) -> list[int]:
    """Where the turns begin: evenly spaced, the last one PROMPT tokens before `context`."""
    return [context * (turn + 1) // turns - PROMPT for turn in range(turns)]


class Replay:
    """One conversation at a time: a turn at each depth, of every policy, on KV that they share."""

    def __init__(
        self,
        model: Model,
        encode: Callable[[str], list[int]],
        policies: dict[str, Policy],
        context: int,
        turns: int,
        answer: int,
    ) -> None:
        self._model, self._encode, self._answer = model, encode, answer
        self._policies = list(policies.values())
        self._depths = depths(context, turns)
        self.full = Contender(Full())
        self.results = {name: Result(Contender(policy, Probe())) for name, policy in policies.items()}
        self.floor = Result(Contender(Full()))

    def conversation(self, ids: list[int]) -> None:
        cache, other = self._model.new_cache(), self._model.new_cache()
        for start in self._depths:
            for one, chunk in ((cache, 128), (other, 96)):
                one.selection = None
                one.truncate(min(one.length, self._before(start)), 128)
                prefill(self._model, one, ids[one.length : start], chunk)
            score_history(self._model, cache, ids, self._policies, self._encode)
            self._turn(cache, other, ids, start)
        for result in self.results.values():
            result.contender.leave()

    def _before(self, start: int) -> int:
        """Where the turn before the one at `start` begins: KV is full attention's up to there."""
        return max([depth for depth in self._depths if depth < start], default=0)

    def _turn(self, cache: SessionCache, other: SessionCache, ids: list[int], start: int) -> None:
        last = start == self._depths[-1]
        n_scored = self._answer if last else max(8, self._answer // 4)
        prompt, answer = ids[start : start + PROMPT], ids[start + PROMPT :][:n_scored]
        reference = self.full.turn(self._model, cache, start, prompt, answer)
        for result in self.results.values():
            logits = result.contender.turn(self._model, cache, start, prompt, answer)
            self._add(result, start, reference, logits, answer, last)
        logits = self.floor.contender.turn(self._model, other, start, prompt, answer)
        self._add(self.floor, start, reference, logits, answer, last)

    def _add(
        self, result: Result, start: int, reference: torch.Tensor, logits: torch.Tensor, answer: list[int], last: bool
    ) -> None:
        decoded = reference[1:], logits[1:], answer[1:]
        result.turns.setdefault(start, Distance()).add(*decoded)
        if last:
            result.last.add(*decoded)


def table(told: dict[str, dict[str, Any]], columns: tuple[str, ...]) -> str:
    rows = ["| policy | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    rows += [f"| {name} | " + " | ".join(_cell(found.get(c)) for c in columns) + " |" for name, found in told.items()]
    return "\n".join(rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def summary(told: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures that have names of their own, as far as their policies were measured."""
    kl = {name: found["kl_mean"] for name, found in told.items()}
    found = {f"kl_{p}_{n}": told[n][f"kl_{p}"] for n in ("sieve", "rocketkv") if n in told for p in ("mean", "p99")}
    for name, first, second in (
        ("kl_sieve_over_oracle", "sieve", "oracle"),
        ("kl_shadowkv_no_outliers_over_with", "shadowkv_no_outliers", "shadowkv"),
    ):
        if first in kl and second in kl:
            found[name] = kl[first] / kl[second]
    if "sieve" in told:
        found["hot_bytes_sieve_counted"] = told["sieve"]["hot_share"]
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="folder with mtbench101.jsonl; without it, made-up sentences")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=3, help="turns before the answer included, at even depths")
    parser.add_argument("--answer", type=int, default=96, help="tokens of a last turn; a quarter in others")
    parser.add_argument("--share", type=float, default=0.06, help="of the context that is attended to")
    parser.add_argument("--policies", help="names with commas between; all without it")
    parser.add_argument("--kvpress", action="store_true", help="rows of kvpress's methods too")
    parser.add_argument("--plots", type=Path, help="folder for PNGs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    spin_as_the_daemon()
    model = load_model(options.model)
    budget = round(options.share * options.context) // 2 * 2
    chosen = only(contenders(budget, options.share, model.facts), options.policies)
    tokenizer = load_tokenizer(modelstore.resolve(options.model).path)
    texts = conversations(
        tokenizer, options.data, options.conversations, options.context + options.answer, options.seed
    )
    replay = Replay(model, tokenizer.encode, chosen, options.context, options.turns, options.answer)
    with torch.inference_mode():
        for number, ids in enumerate(texts):
            replay.conversation(ids)
            out.print(f"conversation {number + 1} of {len(texts)}")
    told = {name: result.told() for name, result in replay.results.items()}
    told["chunking"] = replay.floor.told()
    floor = told["chunking"]
    for found in told.values():
        found["grade"] = grade(found, floor, found["by_depth"], floor["by_depth"])
    if options.kvpress:
        n = options.context + 1  # the same positions are scored
        asked = [{"ids": ids, "n_context": n, "prompt": PROMPT + 1} for ids in texts]
        told |= peer(options.model, asked, budget)["policies"]
    for columns in ((*COLUMNS, "grade"), INSIDE, (*BYTES, "hot_share")):
        out.print(table(told, columns) + "\n", markup=False, soft_wrap=True)
    if options.plots:
        from _plots import quality_against_bytes, quality_against_depth

        quality_against_bytes(told, model.shape.bytes_per_token * options.context, options.plots)
        quality_against_depth(told, options.plots)
    print_json({"benchmark": "fidelity", **summary(told), "policies": told, **_conditions(options, model, budget)})


def _conditions(options: Any, model: Model, budget: int) -> dict[str, Any]:
    names = ("context", "conversations", "turns", "answer", "seed")
    return {
        "dtype": str(model.module.dtype).removeprefix("torch."),
        "budget": budget,
        "kv_bytes_per_token": model.shape.bytes_per_token,
        **{name: getattr(options, name) for name in names},
        "data": "mtbench101" if options.data else "made up",
        "date": today(),
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
