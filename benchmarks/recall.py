"""Facts asked for the first time in later turns, under each policy (task T0). A table, one JSON line last.

The model is trained for this (_recall_model.py; minutes, once) and with full attention tells every fact it was told. So
what is not told is the policy's loss. The policies choose among the same KV, and at every step attend to a sixteenth of
the first turn's history; but `kvzip` to 30% of all, its own share, and `int8`, `int4` and `kivi` to all, in few bits.
In the first turn all there is is the turn's own, which takes part under any policy; `t0_*` counts later turns only,
`slope_*` is of all. `oracle` knows all weights; `random` and `window` must fail.

The model's attention weights are set near the circuit that recalls (_recall_start.py) before training, which sharpens
it. So few sharp matches decide, which favours indexes of single keys, and disfavours landmarks of chunks and low rank.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _bench import Neighbours, console, machine, print_json, rounded, spin_as_the_daemon, today
from _recall_model import FOLDER, Recipe, trained
from _recall_score import first_asks, flips, loss_bound, mcnemar, retention, slope, slope_interval
from _recall_task import Heard, Shape, conversation, converse
from _references import Oracle, Random

from sessiond.cache import SessionCache
from sessiond.model import Model
from sessiond.policies.base import Policy
from sessiond.policies.full import Full
from sessiond.policies.prior import Prior
from sessiond.policies.probing import Instruction
from sessiond.policies.registry import parse
from sessiond.zipping import score

TARGET = 0.995  # of facts that full attention must recall
SLOPES = ("sieve", "rocketkv", "snapkv_once")
COUNTS = ("rocketkv", "sieve", "shadowkv", "window", "random", "kvzip")

# This model knows no language to be asked in: it is shown its context again, as after a request to repeat it.
UNASKED = Instruction((), (), ())

out = console()


def policies(budget: int, only: Sequence[str] | None = None) -> dict[str, Policy]:
    """Every method, or of these `only` some: attending to about `budget` tokens of history, or views without a budget.

    Quest's two dense layers would be all of this model. ShadowKV's outliers are the share of its budget that the paper
    gives them, whose chunks of 8 hold more than two facts here: `shadowkv` has chunks of 2, the rows beside it others.
    """
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "rocketkv": ("rocketkv", {"budget": 2 * budget}),
        "sieve": ("sieve", {"least": budget, "most": budget}),
        "shadowkv": ("shadowkv", {"budget": budget, "outliers": budget // 48, "chunk": 2}),
        "shadowkv_chunk4": ("shadowkv", {"budget": budget, "outliers": budget // 48, "chunk": 4}),
        "shadowkv_chunk8": ("shadowkv", {"budget": budget, "outliers": budget // 48, "chunk": 8}),
        "quest": ("quest", {"budget": budget, "dense_layers": 0}),
        "snapkv": ("snapkv", {"budget": budget}),
        "snapkv_once": ("snapkv", {"budget": budget, "once": True}),
        "h2o": ("h2o", {"budget": budget, "recent": budget // 2}),
        "window": ("window", {"sinks": 4, "recent": budget - 4}),
        "int8": ("int8", {}),
        "int4": ("int4", {}),
        "kivi": ("kivi", {}),
        "kvzip": ("kvzip", {"share": 0.3}),
    }
    made: dict[str, Callable[[], Policy]] = {
        title: partial(parse, name, knobs) for title, (name, knobs) in methods.items()
    }
    made |= {"oracle": partial(Oracle, budget), "random": partial(Random, budget)}
    return {title: make() for title, make in made.items() if only is None or title in only}


@dataclass
class Result:
    right: list[list[bool]] = field(default_factory=list)  # [conversation][turn]
    attended: list[float] = field(default_factory=list)
    index_bytes: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, heard: Heard, seconds: float) -> None:
        self.right.append(heard.right)
        self.attended += heard.attended
        self.index_bytes.append(heard.index_bytes)
        self.seconds += seconds


def score_history(model: Model, cache: SessionCache, ids: Sequence[int]) -> Prior | None:
    """KVzip's scores of a history, as a daemon makes them when a turn is over."""
    return score(model, cache, ids, UNASKED)


def measure(
    model: Model, recipe: Recipe, shape: Shape, seeds: Sequence[int], chosen: dict[str, Policy], *, own: bool
) -> dict[str, Result]:
    """Every conversation under every policy, `full` first: its KV is what the others choose from."""
    results = {name: Result() for name in ("full", *chosen)}
    reference, cache = model.new_cache(), model.new_cache()
    for number, seed in enumerate(seeds):
        turns = conversation(recipe, shape, seed)
        for name, result in results.items():
            began = time.perf_counter()
            if name == "full":
                heard = converse(model, Full(), turns, reference, None if own else reference)
            else:
                told = score_history if chosen[name].wants_prior else None
                heard = converse(model, chosen[name], turns, cache, None if own else reference, told)
            result.add(heard, time.perf_counter() - began)
        if (number + 1) % 25 == 0:
            out.print(f"conversation {number + 1} of {len(seeds)}")
    return results


def told(result: Result, full: torch.Tensor, asks: torch.Tensor, seed: int) -> dict[str, Any]:
    """A policy's figures; `asks` [C]: the later turn of each conversation that T0 counts, -1 for none."""
    right = torch.tensor(result.right)
    counted = asks >= 0
    lost, won = flips(full, right)
    later = full[:, 1:]  # in the first turn no policy can lose
    return {
        "t0": int(right.gather(1, asks.clamp(min=0)[:, None])[counted].sum()),
        "retention_by_turn": [rounded(share) for share in retention(full, right).tolist()],
        "retention_later": rounded(float((full & right)[:, 1:].sum() / full[:, 1:].sum())),
        "slope": rounded(slope(full, right)),
        "slope_ci": [rounded(end) for end in slope_interval(full, right, seed=seed)],
        "only_full_right": lost,
        "only_method_right": won,
        "mcnemar_p": mcnemar(lost, won),
        "loss_bound": loss_bound(flips(later, right[:, 1:])[0], int(later.sum())),
        "attended": rounded(sum(result.attended) / len(result.attended)) if result.attended else 1.0,
        "index_bytes_per_token": rounded(sum(result.index_bytes) / len(result.index_bytes)),
        "seconds": rounded(result.seconds),
    }


def table(found: dict[str, dict[str, Any]], n_asks: int) -> str:
    titles = f"first, of {n_asks}", "later turns", "lost / won", "p", "points a turn", "attended", "index B/token"
    rows = ["| policy | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, one in found.items():
        (low, high), bound = one["slope_ci"], one["loss_bound"]
        cells = (
            f"{one['t0']}",
            f"{one['retention_later']:.2%}",
            f"{one['only_full_right']} / {one['only_method_right']}",
            f"{one['mcnemar_p']:.2g}" if bound is None else f"loss < {bound:.2%}",
            f"{one['slope']:+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{one['attended']:.3f}",
            f"{one['index_bytes_per_token']:.1f}",
        )
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def options_of(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--conversations", type=int, default=300)
    parser.add_argument("--own", action="store_true", help="history goes on with a method's own answers")
    parser.add_argument("--seed", type=int, default=1000, help="of the first conversation")
    parser.add_argument("--policies", nargs="*", help="only these")
    parser.add_argument("--threads", type=int, default=1, help="steps of so small a model gain nothing from more")
    parser.add_argument("--models", type=Path, default=FOLDER, help="where the trained model is kept")
    return parser.parse_args()


def main() -> None:
    options = options_of(__doc__)
    spin_as_the_daemon()
    recipe, shape = Recipe(), Shape()
    path, training_seconds = trained(recipe, shape.n_tokens // 6, TARGET, out.print, options.models)
    torch.set_num_threads(options.threads)
    model = Model.load(path)
    budget = shape.history // 16
    chosen = policies(budget, options.policies)
    if options.policies and (missing := set(options.policies) - chosen.keys()):
        raise SystemExit(f"no policy here by the name of {', '.join(sorted(missing))}")
    neighbours, began = Neighbours(), time.perf_counter()
    seeds = range(options.seed, options.seed + options.conversations)
    results = measure(model, recipe, shape, seeds, chosen, own=options.own)
    full = torch.tensor(results["full"].right)
    accuracy = float(full.double().mean())
    if accuracy < TARGET - 3 * math.sqrt(TARGET * (1 - TARGET) / full.numel()):  # by more than chance explains
        raise RuntimeError(f"full attention recalls {accuracy:.2%} of asks, asked were {TARGET:.1%}")
    asks = first_asks(full, options.seed)
    n_asks = int((asks >= 0).sum())
    found = {name: told(result, full, asks, options.seed) for name, result in results.items()}
    out.print(table(found, n_asks), markup=False, soft_wrap=True)
    print_json(
        {
            "benchmark": "recall",
            **{f"t0_{name}": found[name]["t0"] for name in COUNTS if name in found},
            **{f"slope_{name}_ci": found[name]["slope_ci"] for name in SLOPES if name in found},
            "t0_asks": n_asks,
            "full_accuracy": accuracy,
            "policies": found,
            "history": "own answers" if options.own else "right answers",
            "conversations": options.conversations,
            "turns": shape.turns,
            "tokens": shape.n_tokens,
            "budget": budget,
            "seed": options.seed,
            "model": recipe.name,
            "start": "set near the recall circuit",
            "dtype": str(model.module.dtype).removeprefix("torch."),
            "training_seconds": rounded(training_seconds),
            "seconds": rounded(time.perf_counter() - began),
            "others_cpu_share": neighbours.share(),
            "threads": options.threads,
            "date": today(),
            "machine": machine(),
        }
    )


if __name__ == "__main__":
    main()
