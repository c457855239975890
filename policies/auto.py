"""Auto, our own: settles before each turn on what the session's length, the memory left and the last turn ask for.

Short histories get full attention: nothing is won by leaving tokens out. Long ones, and all but the shortest when
memory is scarce, get sieve, whose exact KV lies one tier down. What its last choice missed decides how much it may
read now. The reason is told in ExplainTurn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from sessiond.policies.base import ModelFacts, Policy, Selector, Situation
from sessiond.policies.full import Full
from sessiond.policies.knobs import share, whole
from sessiond.policies.sieve import Sieve


@dataclass(frozen=True, slots=True)
class Auto(Policy):
    """Full attention up to `dense_until` tokens, or `scarce_until` when memory is used beyond `pressure`; then sieve.

    Sieve reads up to `part` of the tokens, rounded up to a power of two; twice that if the last turn's choice held less
    than `mass` of the attention.
    """

    name: ClassVar[str] = "auto"
    dense_until: int = 4096
    scarce_until: int = 512
    pressure: float = 0.8
    part: float = 0.0625
    mass: float = 0.97

    def __post_init__(self) -> None:
        whole(self.name, "dense_until", self.dense_until, 0, 1 << 30)
        whole(self.name, "scarce_until", self.scarce_until, 0, self.dense_until)
        for knob in ("pressure", "part", "mass"):
            share(self.name, knob, getattr(self, knob))

    def settle_on(self, situation: Situation) -> tuple[Policy, str]:
        n, used, held = situation.n_tokens, situation.memory_used, situation.attention_mass
        is_scarce = used >= self.pressure
        limit = self.scarce_until if is_scarce else self.dense_until
        memory = f"memory {used:.0%} used, {'scarce' if is_scarce else 'enough'} by {self.pressure:.0%}"
        if n <= limit:
            return Full(), f"auto: full attention: {n} tokens, up to {limit} read whole ({memory})"
        missed = held is not None and held < self.mass
        most = max(64, power_of_two(n * min(1.0, self.part * (2 if missed else 1))))
        told = (
            "not measured yet" if held is None else f"{held:.1%}, {'below' if missed else 'at least'} {self.mass:.0%}"
        )
        why = f"auto: sieve of up to {most} of {n} tokens, above {limit} ({memory}; last turn's attention mass {told})"
        return Sieve(least=64, most=most), why

    def index_bytes(self, model: ModelFacts) -> int:
        return Sieve().index_bytes(model)

    def selector(self, layer: int, n_layers: int) -> Selector | None:
        """Auto itself leaves nothing out: a turn runs under what it settled on."""
        return None


def power_of_two(n: float) -> int:
    """The next one: turns settle on equal policies while a session grows, so what these derived stays."""
    return 1 << max(0, math.ceil(n) - 1).bit_length()
