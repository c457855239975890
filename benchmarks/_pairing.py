"""Statistics of paired outcomes: the same questions answered with full history and by a method; turns of one
conversation are not independent, so whole conversations are drawn in the bootstrap."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DRAWS = 2000


def retention(full: Sequence[bool], method: Sequence[bool]) -> dict[str, Any]:
    """How often the method is right where full history is; how often where that is wrong; whether that is chance."""
    pairs = list(zip(full, method, strict=True))
    lost, won = sum(f and not m for f, m in pairs), sum(m and not f for f, m in pairs)
    right = sum(full)
    return {
        "retention": 1 - lost / right if right else None,
        "reverse_flips": won / (len(pairs) - right) if right < len(pairs) else None,
        "lost": lost,
        "won": won,
        "mcnemar_p": mcnemar(lost, won),
    }


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided probability of so uneven a split of the discordant pairs, were both as likely."""
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    return min(1.0, 2 * tail)


def interval(
    clusters: Mapping[Any, Sequence[Any]], statistic: Callable[[list[Any]], float | None], seed: int = 0
) -> list[float] | None:
    """95% percentile interval of `statistic` over whole clusters drawn with replacement; None for a single cluster.

    Draws on which the statistic is None are left out.
    """
    if len(clusters) < 2:
        return None
    draw, groups = random.Random(seed), list(clusters.values())
    found = [statistic([x for group in draw.choices(groups, k=len(groups)) for x in group]) for _ in range(DRAWS)]
    known = sorted(x for x in found if x is not None)
    if not known:
        return None
    return [known[round(q * (len(known) - 1))] for q in (0.025, 0.975)]


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the least-squares line through (x, y); None if all x are the same."""
    if not points:
        return None
    x_mean, y_mean = (sum(part) / len(points) for part in zip(*points, strict=True))
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else None
