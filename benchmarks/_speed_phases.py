"""What bench-speed measures, phase by phase: one contender computes at a time, in the order ABBA."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from _bench import alternating, median
from _contender import Contender, Stream, cpu_seconds
from _speed_ours import Ours
from _speed_report import gaps, percentile, throughput, token_ms

T = TypeVar("T")
MOST_IDLE_SHARE = 0.05  # of one core, that a contender may use while another is measured


@dataclass(slots=True)
class Measured:
    """`values`: by metric and contender, in the order of repeats. `answers`: by prompt and contender, first seen."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    answers: dict[str, dict[str, list[int]]] = field(default_factory=lambda: defaultdict(dict))
    idle_cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    idle_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def note(self, metric: str, name: str, value: float) -> None:
        self.values[metric][name].append(value)

    def idle_shares(self) -> dict[str, float]:
        """Share of a core that each contender used while others were measured."""
        return {name: round(self.idle_cpu[name] / seconds, 4) for name, seconds in self.idle_seconds.items() if seconds}


class Text:
    """Stretches of one long text, no two of which begin alike, so that nothing can be shared."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        self._at = 0

    def take(self, n_tokens: int) -> list[int]:
        if n_tokens >= len(self._ids):
            raise ValueError(f"the text holds {len(self._ids)} tokens, not {n_tokens}")
        start = self._at % (len(self._ids) - n_tokens)
        self._at += n_tokens + 97
        return self._ids[start : start + n_tokens]


class Field:
    """The contenders that take part in a phase, and what is measured of them."""

    def __init__(self, contenders: Sequence[Contender], measured: Measured, say: Callable[[str], None]) -> None:
        self.contenders = contenders
        self.measured = measured
        self.say = say

    @property
    def ours(self) -> list[Ours]:
        return [one for one in self.contenders if isinstance(one, Ours)]

    def in_turn(self, repeat: int) -> Iterator[Contender]:
        yield from self.contenders if alternating(repeat) else reversed(self.contenders)

    def alone(self, contender: Contender, action: Callable[[], T]) -> T:
        """Run what is measured of one, watching that the others rest."""
        others = [other for other in self.contenders if other is not contender]
        before = [cpu_seconds(other.pids()) for other in others]
        began = time.perf_counter()
        result = action()
        took = time.perf_counter() - began
        for other, used in zip(others, before, strict=True):
            self.measured.idle_cpu[other.name] += cpu_seconds(other.pids()) - used
            self.measured.idle_seconds[other.name] += took
        return result

    def check_rest(self) -> None:
        """Raises RuntimeError if a contender was busy while another was measured."""
        for name, share in self.measured.idle_shares().items():
            if share > MOST_IDLE_SHARE:
                raise RuntimeError(f"{name} used {share:.0%} of a core while others were measured")

    def hold(self, prompts: dict[int, list[int]]) -> None:
        for contender in self.contenders:
            began = time.perf_counter()
            contender.hold(prompts)
            took = time.perf_counter() - began
            self.say(f"  {contender.name} computed {sum(map(len, prompts.values())):,} tokens in {took:.1f} s")

    def release(self) -> None:
        for contender in self.contenders:
            contender.release()


def check_lengths(streams: Sequence[Stream], n_tokens: int) -> None:
    """Raises RuntimeError unless as many tokens were decoded as were asked for."""
    for stream in streams:
        if len(stream.token_ids) != n_tokens:
            raise RuntimeError(f"{len(stream.token_ids)} of {n_tokens} tokens were decoded: not comparable")


def decode(field_: Field, context: int, ids: list[int], n_tokens: int, repeats: int, policies: Sequence[str]) -> None:
    """Decoding by one session after a prompt of `ids`; ours under each of `policies` too, each in a session of its own.

    A session that changed its policy every turn would build an index every turn.
    """
    field_.hold({0: ids})
    entries: list[tuple[str, Contender, str | None, int]] = [(one.name, one, None, 0) for one in field_.contenders]
    for number, policy in enumerate(policies, 1):
        for one in field_.ours:
            one.hold({number: ids})
            entries.append((f"{one.name}_{policy}", one, policy, number))
    for repeat in range(-1, repeats):  # the first warms up
        for name, contender, policy, number in entries if alternating(repeat) else reversed(entries):
            if isinstance(contender, Ours):
                contender.policy = policy
            streams = field_.alone(contender, partial(contender.decode, [number], n_tokens))
            check_lengths(streams, n_tokens)
            if repeat >= 0:
                field_.measured.note(f"decode_ms_{context}", name, token_ms(streams[0]))
                field_.measured.answers[f"decode_{context}"].setdefault(name, streams[0].token_ids)
    for ours in field_.ours:
        ours.policy = None
    field_.release()
    say_medians(field_, f"decode_ms_{context}", "ms a token")


def prefill(field_: Field, context: int, text: Text, n_tokens: int, repeats: int) -> None:
    """Time to the first token after prompts of which nothing is known."""
    for repeat in range(repeats):
        ids = text.take(n_tokens)
        for contender in field_.in_turn(repeat):
            stream = field_.alone(contender, partial(contender.prefill, ids))
            check_lengths([stream], 1)
            field_.measured.note(f"prefill_ms_{context}", contender.name, stream.ttft_ms)
            field_.measured.answers[f"prefill_{context}_{repeat}"][contender.name] = stream.token_ids
    say_medians(field_, f"prefill_ms_{context}", "ms")


def batch(field_: Field, sizes: Sequence[int], n_tokens: int, repeats: int) -> None:
    """Tokens a second of held prompts 0, 1, .. decoding at once."""
    for size in sizes:
        for repeat in range(-1, repeats):
            for contender in field_.in_turn(repeat):
                streams = field_.alone(contender, partial(contender.decode, range(size), n_tokens))
                check_lengths(streams, n_tokens)
                if repeat >= 0:
                    field_.measured.note(f"throughput_{size}", contender.name, throughput(streams))
                    for number, stream in enumerate(streams):
                        field_.measured.answers[f"batch_{number}"].setdefault(contender.name, stream.token_ids)
        say_medians(field_, f"throughput_{size}", "tokens a second in all")


def stall(field_: Field, n_sessions: int, text: Text, n_prefill: int, n_tokens: int, repeats: int) -> None:
    """Inter-token times of held prompts while a new session is prefilled, over those without it; ours only."""
    numbers = range(n_sessions)
    for _ in range(repeats):
        for ours in field_.ours:
            without = [gap for stream in ours.decode(numbers, n_tokens) for gap in gaps(stream)]
            streams, other = ours.decode_beside_prefill(numbers, text.take(n_prefill))
            window = other.began, other.arrivals[0][0]
            beside = [gap for stream in streams for gap in gaps(stream, *window)]
            middle = median(without)
            field_.measured.note("stall_p99_ratio", ours.name, percentile(beside, 99) / middle)
            field_.measured.note("stall_max_ratio", ours.name, max(beside) / middle)
            field_.measured.note("stall_median_ms", ours.name, middle * 1e3)
            field_.measured.note("stall_p99_ms", ours.name, percentile(beside, 99) * 1e3)
            field_.measured.note("stall_prefill_ms", ours.name, other.ttft_ms)
    say_medians(field_, "stall_p99_ratio", "times the median without a prefill, at the 99th percentile")


def own_code(field_: Field, n_sessions: int, n_tokens: int, repeats: int) -> None:
    """Share of a step in the daemon's own code while held prompts decode at once."""
    metric = f"own_code_share_{n_sessions}"
    for _ in range(repeats):
        for ours in field_.ours:
            field_.measured.note(metric, ours.name, ours.share_of_own_code(range(n_sessions), n_tokens))
    say_medians(field_, metric, "of a step")


def say_medians(field_: Field, metric: str, unit: str) -> None:
    found = field_.measured.values[metric]
    field_.say(f"{metric}: " + ", ".join(f"{name} {median(values):.4g}" for name, values in found.items()) + f" {unit}")
