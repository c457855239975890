"""Whether sealing gives back the KV of full attention after any policies, on the real model. One JSON line last.

Each policy runs a session of ten turns, and some sessions change theirs every turn. Then the session is sealed, and its
sealed cells are compared byte for byte with those of a session that ran `full` throughout on the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _bench import arguments, console, machine, print_json, spin_as_the_daemon, today
from _chat_text import conversations
from _model import load_model

from sessiond import modelstore
from sessiond.cache import SessionCache
from sessiond.model import Model, load_tokenizer
from sessiond.policies.base import Policy, Situation
from sessiond.policies.full import Full
from sessiond.policies.registry import POLICIES, parse
from sessiond.sampling import Sampler, SamplingParams
from sessiond.scheduler import Ended, Scheduler, SealWork, TokenOut, TurnWork
from sessiond.storage.kv import kv_digest
from sessiond.textstream import Detokenizer, TextStream
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
out = console()


@dataclass
class Session:
    """One conversation on the engine's own scheduler."""

    model: Model
    detokenizer: Detokenizer
    log: list[int] = field(default_factory=list)
    cache: SessionCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = self.model.new_cache()

    def turn(self, ids: Sequence[int], policy: Policy) -> None:
        turn_start = len(self.log)
        self.log += ids
        scheduler = Scheduler(self.model, CELL)
        settled, _ = policy.settle_on(Situation(len(self.log), 0.0))
        scheduler.add(
            TurnWork(
                "turn",
                self.cache,
                list(self.log),
                (),
                cell_tokens=CELL,
                seal=True,
                known=self.cache.length,
                max_new=ANSWER,
                max_context=self.model.max_context,
                stop_ids=frozenset(),
                sampler=Sampler(SamplingParams(), self.model.vocab_size, self.log),
                stream=TextStream(self.detokenizer),
                policy=settled,
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

    def digests(self) -> list[str]:
        ends = range(CELL, self.cache.sealed + 1, CELL)
        return [kv_digest(self.cache.arrays(Span(end - CELL, end))) for end in ends]


def is_exact(session: Session) -> tuple[bool, bool]:
    """Whether the sealed cells are those of full attention, and whether any of them was another before."""
    whole = len(session.log) // CELL
    before = [kv_digest(session.cache.arrays(Span(i * CELL, (i + 1) * CELL))) for i in range(whole)]
    session.seal()
    other = Session(session.model, session.detokenizer, list(session.log))
    other.seal()
    sealed = session.digests()
    return len(sealed) == whole and sealed == other.digests(), before != sealed


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", type=int, default=4, help="sessions whose policy changes every turn")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    spin_as_the_daemon()
    model = load_model(options.model)
    tokenizer = load_tokenizer(modelstore.resolve(options.model).path)
    text = conversations(tokenizer, None, 1, sum(INPUTS), options.seed)[0]
    policies = {name: parse(name, SMALL.get(name, {})) for name in POLICIES}
    draw = random.Random(options.seed)
    plans: dict[str, list[Policy]] = {name: [policy] * len(INPUTS) for name, policy in policies.items()}
    for i in range(options.sequences):
        plans[f"sequence {i + 1}"] = [*draw.choices(list(policies.values()), k=len(INPUTS) - 1), Full()]
    told = {}
    with torch.inference_mode():
        for name, plan in plans.items():
            session, at = Session(model, Detokenizer(tokenizer)), 0
            for n, policy in zip(INPUTS, plan, strict=True):
                session.turn(text[at : at + n], policy)
                at += n
            exact, changed = is_exact(session)
            told[name] = {"exact": exact, "was_another": changed, "cells": session.cache.sealed // CELL}
            out.print(f"{name}: {'exact' if exact else 'NOT EXACT'}{', was another before' if changed else ''}")
    passed = sum(told[name]["exact"] for name in policies)
    print_json(
        {
            "benchmark": "exact_after_policy",
            "exact_after_policy": f"{passed}/{len(policies)}",
            "exact_after_sequences": f"{sum(one['exact'] for one in told.values()) - passed}/{options.sequences}",
            "sessions": told,
            "turns": len(INPUTS),
            "seed": options.seed,
            "date": today(),
            "machine": machine(),
        }
    )
    if not all(one["exact"] for one in told.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
