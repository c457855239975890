"""How good an approximation of full attention is, in a word. The strictest that all conditions allow, in every turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LOSSLESS, NEAR, GOOD, LOSSY = "lossless", "near-lossless", "good", "lossy"


def grade(
    found: Mapping[str, Any],
    floor: Mapping[str, Any],
    turns: Sequence[Mapping[str, Any]] = (),
    floor_turns: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Of the figures `Distance.told` gives; `floor`: the same of full attention against itself, computed in other
    pieces; `turns`, `floor_turns`: those of each turn, of which the worst of each figure counts.

    Top-1 is that of decided positions: a small model's ties flip by rounding alone. Without any it says nothing.
    """
    mean, p99, agreed = _worst([found, *turns])
    floor_mean, floor_p99, _ = _worst([floor, *floor_turns])
    if mean <= 2 * floor_mean and p99 <= 2 * floor_p99 and agreed >= 0.99:
        return LOSSLESS
    if mean <= 0.01 and p99 <= 0.10 and agreed >= 0.99:
        return NEAR
    return GOOD if mean <= 0.03 and agreed >= 0.97 else LOSSY


def _worst(some: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Mean KL, its 99th percentile, and the share of decided positions that agree."""
    agreed = [one["top1_decided"] for one in some if one["top1_decided"] is not None]
    return max(one["kl_mean"] for one in some), max(one["kl_p99"] for one in some), min(agreed, default=1.0)
