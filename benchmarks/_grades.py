"""How good an approximation of full attention is, in a word. The strictest that all conditions allow, in every turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LOSSLESS, NEAR, GOOD, LOSSY = "lossless", "near-lossless", "good", "lossy"


def grade(
    found: Mapping[str, Any], floor: Mapping[str, Any], turns: Sequence[float] = (), floor_turns: Sequence[float] = ()
) -> str:
    """Of the figures `Distance.told` gives; `floor`: the same of full attention against itself, computed in other
    pieces; `turns`, `floor_turns`: mean KL of each turn, of which the worst counts.

    Top-1 is that of decided positions: a small model's ties flip by rounding alone. Without any it says nothing.
    """
    worst = max([found["kl_mean"], *turns])
    agreed = 1.0 if found["top1_decided"] is None else found["top1_decided"]
    worst_floor = max([floor["kl_mean"], *floor_turns])
    if worst <= 2 * worst_floor and found["kl_p99"] <= 2 * floor["kl_p99"] and agreed >= 0.99:
        return LOSSLESS
    if worst <= 0.01 and found["kl_p99"] <= 0.10 and agreed >= 0.99:
        return NEAR
    return GOOD if worst <= 0.03 and agreed >= 0.97 else LOSSY
