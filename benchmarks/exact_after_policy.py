"""Whether sealing gives back the KV of full attention after any policies, on the real model. One JSON line last.

Each policy runs a session of ten turns, and some sessions change theirs every turn; history is scored before a turn
whose policy wants it. Then the session is sealed, and its sealed cells are compared byte for byte with those of a
session that ran the same turns under `full` throughout, was fed the same answers token by token, and sealed too.
A policy whose KV was that of the session under `full` before both were sealed proves nothing: that fails the run too,
but for `full` and `auto`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from _bench import arguments, console, machine, print_json, spin_as_the_daemon, today
from _chat_text import conversations
from _contenders import only
from _model import load_model
from _scoring import score_history

from sessiond import modelstore
from sessiond.cache import SessionCache
from sessiond.idlework import SealWork
from sessiond.model import Model, load_tokenizer
from sessiond.policies.base import Policy, Situation
from sessiond.policies.full import Full
from sessiond.policies.registry import POLICIES, parse
from sessiond.sampling import Sampler, SamplingParams
from sessiond.scheduler import Scheduler
from sessiond.stepevents import Ended, TokenOut
from sessiond.storage.kv import kv_digest
from sessiond.textstream import Detokenizer, TextStream
from sessiond.turnwork import TurnWork
from sessiond.types import Span

CELL = 128
INPUTS = (300, 40, 63, 127, 128, 129, 5, 90, 1, 16)
ANSWER = 6
# Knobs so small that every policy leaves tokens out of a conversation of a thousand.
SMALL: dict[str, dict[str, Any]] = {
    "window": {"sinks": 4, "recent": 60},
    "h2o": {"budget": 64, "recent": 32},
    "snapkv": {"budget": 64},
    "adakv": {"budget": 64},
    "quest": {"budget": 64},
    "rocketkv": {"budget": 64},
    "shadowkv": {"budget": 96, "outliers": 2, "local": 2},
    "sieve": {"least": 16, "most": 64},
    "kivi": {"residual": 32},
    "auto": {"dense_until": 256, "scarce_until": 0},
    "viewed": {"of": {"name": "quest", "budget": 64}},
    "layers": {"rules": [{"layers": "1-", "policy": {"name": "sieve", "least": 16, "most": 64}}]},
    "prior": {"of": {"name": "sieve", "least": 16, "most": 64}},
}
MAY_CHANGE_NOTHING = ("full", "auto")
out = console()


@dataclass
class Session:
    """One conversation on the engine's own scheduler; `encode` is its model's."""

    model: Model
    detokenizer: Detokenizer
    encode: Callable[[str], list[int]]
    log: list[int] = field(default_factory=list)
    cache: SessionCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = self.model.new_cache()

    def turn(self, ids: Sequence[int], policy: Policy) -> list[int]:
        """Append `ids`, and an answer of ANSWER greedy tokens, which it returns."""
        settled, _ = policy.settle_on(Situation(len(self.log) + len(ids), 0.0))
        if self.cache.length:
            score_history(self.model, self.cache, self.log, [settled], self.encode)
        self._run(ids, settled, (), ANSWER)
        return self.log[-ANSWER:]

    def force(self, ids: Sequence[int], answer: Sequence[int]) -> None:
        """The same turn under full attention, with `answer` as if it had been sampled: its last token is not fed."""
        self._run(ids, Full(), answer, len(answer) + 1)
        self.log[-1:] = answer  # in place of the token that was sampled behind it
        self.cache.truncate(len(self.log) - 1, CELL)

    def _run(self, ids: Sequence[int], policy: Policy, logged: Sequence[int], max_new: int) -> None:
        turn_start = len(self.log)
        self.log += ids
        scheduler = Scheduler(self.model, CELL)
        scheduler.add(
            TurnWork(
                "turn",
                self.cache,
                list(self.log),
                logged,
                cell_tokens=CELL,
                seal=True,
                known=self.cache.length,
                max_new=max_new,
                max_context=self.model.max_context,
                stop_ids=frozenset(),
                sampler=Sampler(SamplingParams(), self.model.vocab_size, self.log),
                stream=TextStream(self.detokenizer),
                policy=policy,
                turn_start=turn_start,
            )
        )
        while not scheduler.idle:
            for event in scheduler.step():
                if isinstance(event, TokenOut):
                    self.log.append(event.sampled.token_id)
                elif isinstance(event, Ended) and event.error is not None:
                    raise event.error
        if self.cache.selection is not None and self.cache.selection.failure is not None:
            raise self.cache.selection.failure

    def seal(self) -> None:
        scheduler = Scheduler(self.model, CELL)
        scheduler.sealing.append(SealWork("session", self.cache, list(self.log), len(self.log) // CELL * CELL))
        while not scheduler.idle:
            scheduler.step()

    def digests(self, n_cells: int) -> list[str]:
        return [kv_digest(self.cache.arrays(Span(i * CELL, (i + 1) * CELL))) for i in range(n_cells)]


def is_exact(new_session: Callable[[], Session], turns: Sequence[tuple[list[int], Policy]]) -> dict[str, Any]:
    """Whether the sealed cells are those of full attention throughout, and whether the whole cells were before."""
    session, reference = new_session(), new_session()
    for ids, policy in turns:
        reference.force(ids, session.turn(ids, policy))
    if session.log != reference.log:
        raise RuntimeError("the sessions do not hold the same tokens")
    whole = len(session.log) // CELL
    changed = session.digests(whole) != reference.digests(whole)
    session.seal()
    reference.seal()
    cells = session.cache.sealed // CELL
    exact = cells == reference.cache.sealed // CELL == whole and session.digests(whole) == reference.digests(whole)
    return {"exact": exact, "was_another": changed, "cells": cells}


def unproven(told: dict[str, dict[str, Any]], policies: Sequence[str]) -> list[str]:
    """Policies whose sessions held just what the session under `full` held, before either was sealed."""
    return [name for name in policies if name not in MAY_CHANGE_NOTHING and not told[name]["was_another"]]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", type=int, default=4, help="sessions whose policy changes every turn")
    parser.add_argument("--policies", help="names with commas between; all without it")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    spin_as_the_daemon()
    model = load_model(options.model)
    tokenizer = load_tokenizer(modelstore.resolve(options.model).path)
    text = conversations(tokenizer, None, 1, sum(INPUTS), options.seed)[0]
    policies = only({name: parse(name, SMALL.get(name, {})) for name in POLICIES}, options.policies)
    draw = random.Random(options.seed)
    plans: dict[str, list[Policy]] = {name: [policy] * len(INPUTS) for name, policy in policies.items()}
    for i in range(options.sequences):
        plans[f"sequence {i + 1}"] = [*draw.choices(list(policies.values()), k=len(INPUTS) - 1), Full()]
    inputs = [text[end - n : end] for n, end in zip(INPUTS, accumulate(INPUTS), strict=True)]
    told: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for name, plan in plans.items():
            found = is_exact(
                lambda: Session(model, Detokenizer(tokenizer), tokenizer.encode), list(zip(inputs, plan, strict=True))
            )
            told[name] = found
            word = "exact" if found["exact"] else "NOT EXACT"
            out.print(f"{name}: {word}{', was another before' if found['was_another'] else ''}")
    idle = unproven(told, list(policies))
    passed = sum(told[name]["exact"] for name in policies)
    print_json(
        {
            "benchmark": "exact_after_policy",
            "exact_after_policy": f"{passed}/{len(policies)}",
            "exact_after_sequences": f"{sum(one['exact'] for one in told.values()) - passed}/{options.sequences}",
            "changed_nothing": idle,
            "sessions": told,
            "turns": len(INPUTS),
            "seed": options.seed,
            "date": today(),
            "machine": machine(),
        }
    )
    if idle or not all(one["exact"] for one in told.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
