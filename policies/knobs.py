"""Checks of policies' knobs: each names the knob and the allowed range."""

from __future__ import annotations

from collections.abc import Sequence

from sessiond.errors import InvalidConfig


def whole(policy: str, knob: str, value: object, low: int, high: int) -> None:
    """`value` is a whole number in [low, high]. Raises InvalidConfig."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        told = f"policy {policy!r}: {knob} must be a whole number from {low} to {high}, not {value!r}"
        raise InvalidConfig(told, policy=policy, knob=knob, range=f"[{low}, {high}]")


def share(policy: str, knob: str, value: object) -> None:
    """`value` is a number in (0, 1]. Raises InvalidConfig."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        told = f"policy {policy!r}: {knob} must be above 0 and at most 1, not {value!r}"
        raise InvalidConfig(told, policy=policy, knob=knob, range="(0, 1]")


def odd(policy: str, knob: str, value: object, low: int, high: int) -> None:
    """`value` is an odd whole number in [low, high]. Raises InvalidConfig."""
    whole(policy, knob, value, low, high)
    if isinstance(value, int) and value % 2 == 0:
        told = f"policy {policy!r}: {knob} must be an odd number from {low} to {high}, not {value!r}"
        raise InvalidConfig(told, policy=policy, knob=knob, range=f"odd, [{low}, {high}]")


def flag(policy: str, knob: str, value: object) -> None:
    """`value` is true or false. Raises InvalidConfig."""
    if not isinstance(value, bool):
        told = f"policy {policy!r}: {knob} must be true or false, not {value!r}"
        raise InvalidConfig(told, policy=policy, knob=knob, range="true, false")


def one_of(policy: str, knob: str, value: object, known: Sequence[object]) -> None:
    """`value` is one of `known`. Raises InvalidConfig."""
    if value not in known:
        allowed = ", ".join(str(one) for one in known)
        told = f"policy {policy!r}: {knob} must be one of {allowed}, not {value!r}"
        raise InvalidConfig(told, policy=policy, knob=knob, range=allowed)
