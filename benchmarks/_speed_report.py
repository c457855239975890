"""The arithmetic of bench-speed: what streams of tokens say, and ratios with their confidence."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from _bench import agreeing_prefix, median, ratios, rounded, spread
from _contender import Stream

RESAMPLES = 2000
PEERS = ("llama", "transformers")
SPARSE = ("sieve", "rocketkv")
Values = Mapping[str, Mapping[str, Sequence[float]]]


def token_ms(stream: Stream) -> float:
    """Milliseconds a token after the first arrival. Raises ValueError if there was but one."""
    (first_at, first_n), (last_at, last_n) = stream.arrivals[0], stream.arrivals[-1]
    if last_n == first_n:
        raise ValueError("all tokens came at once: there is no time between them")
    return (last_at - first_at) * 1e3 / (last_n - first_n)


def throughput(streams: Sequence[Stream]) -> float:
    """Tokens a second in all while every stream decodes: from the last first token to the first last one.

    Each stream counts by its own arrivals within, so that nothing depends on where in a step that time begins.
    Raises ValueError if there is no such time.
    """
    start = max(stream.arrivals[0][0] for stream in streams)
    end = min(stream.arrivals[-1][0] for stream in streams)
    total = 0.0
    for stream in streams:
        inside = [(at, n) for at, n in stream.arrivals if start <= at <= end]
        if len(inside) < 2:
            raise ValueError("the streams did not decode at the same time: ask for more tokens")
        (first_at, first_n), (last_at, last_n) = inside[0], inside[-1]
        total += (last_n - first_n) / (last_at - first_at)
    return total


def gaps(stream: Stream, start: float = float("-inf"), end: float = float("inf")) -> list[float]:
    """Seconds between arrivals, of those gaps that touch [start, end]. Tokens that come together have one arrival."""
    times = [at for at, _ in stream.arrivals]
    return [b - a for a, b in itertools.pairwise(times) if b > start and a < end]


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest ranks. Raises ValueError if there are no values."""
    if not values:
        raise ValueError("nothing was measured")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def interval(values: Sequence[float], seed: int = 1) -> tuple[float, float]:
    """95% confidence of the median, by bootstrap over the repeats."""
    draw = random.Random(seed)
    medians = [statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    return percentile(medians, 2.5), percentile(medians, 97.5)


def times_faster(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of neighbouring runs, how many times ours is as fast: by times, or by throughputs."""
    return ratios(ours, theirs) if metric.startswith("throughput") else ratios(theirs, ours)


class Figures:
    """The figures of an issue under their names, each with its interval; those of further weights with a suffix."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self.figures: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}
        self.of_medians: dict[str, float] = {}

    def add(self, figure: str, values: Sequence[float]) -> None:
        self.figures[figure] = rounded(median(values))
        self.intervals[figure] = [rounded(end) for end in interval(values)]

    def compare(self, figure: str, metric: str, ours: str, theirs: str) -> None:
        """Nothing if one of the two was not measured."""
        found = self._values.get(metric, {})
        if ours not in found or theirs not in found:
            return
        self.add(figure, times_faster(metric, found[ours], found[theirs]))
        pair = [median(found[ours])], [median(found[theirs])]
        self.of_medians[figure] = rounded(times_faster(metric, *pair)[0])

    def best(self, figure: str, names: Sequence[str]) -> None:
        """The best of some figures, once more under one name."""
        measured = [name for name in names if name in self.figures]
        if measured:
            chosen = max(measured, key=lambda name: self.figures[name])
            for table in (self.figures, self.intervals, self.of_medians):
                table[figure] = table[chosen]  # type: ignore[index]


def figures_of(values: Values, ours: str, suffix: str) -> Figures:
    """All that was measured of one of our daemons."""
    out = Figures(values)
    for metric, found in values.items():
        kind, _, number = metric.rpartition("_")
        if kind in ("decode_ms", "prefill_ms"):
            what = kind.removesuffix("_ms")
            for peer in PEERS:
                out.compare(f"{what}_vs_{peer}_{number}{suffix}", metric, ours, peer)
        if kind == "decode_ms":
            sparse = {policy: f"sparse_decode_{policy}_vs_llama_{number}{suffix}" for policy in SPARSE}
            for policy, figure in sparse.items():
                out.compare(figure, metric, f"{ours}_{policy}", "llama")
            out.best(f"sparse_decode_vs_llama_{number}{suffix}", list(sparse.values()))
        if kind == "throughput" and int(number) > 1:
            for peer in PEERS:
                out.compare(f"batch{number}_vs_{peer}{suffix}", metric, ours, peer)
        if (metric == "stall_p99_ratio" or kind == "own_code_share") and ours in found:
            out.add(f"{metric}{suffix}", found[ours])
    return out


def spreads_of(values: Values) -> dict[str, dict[str, Any]]:
    return {
        metric: {name: spread(found) for name, found in by_name.items() if found} for metric, by_name in values.items()
    }


def agreement(answers: Mapping[str, Mapping[str, Sequence[int]]], ours: str) -> dict[str, dict[str, float]]:
    """No speed without agreement: how many first tokens agree with each peer's, and how many after them.

    Weights and sums differ in their last bits, so a near tie may part two runs. Raises RuntimeError if fewer than half
    of the first tokens agree.
    """
    told: dict[str, dict[str, float]] = {}
    for peer in PEERS:
        pairs = [(found[ours], found[peer]) for found in answers.values() if ours in found and peer in found]
        if not pairs:
            continue
        first = sum(a[0] == b[0] for a, b in pairs)
        if 2 * first < len(pairs):
            raise RuntimeError(f"only {first} of {len(pairs)} first tokens are {peer}'s: not the same computation")
        long = [agreeing_prefix(a, b) for a, b in pairs if min(len(a), len(b)) > 1]
        told[peer] = {"first": first, "of": len(pairs), "median_prefix": median(long) if long else first}
    return told


def lines_of(values: Values, kind: str) -> dict[str, list[tuple[int, float]]]:
    """Medians in tokens a second, by contender, of all metrics `kind`_N; against N."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for metric, found in values.items():
        of, _, number = metric.rpartition("_")
        for name, taken in found.items() if of == kind else ():
            rate = median(taken) if kind == "throughput" else 1e3 / median(taken)
            lines.setdefault(name, []).append((int(number), rate))
    return {name: sorted(points) for name, points in lines.items()}
