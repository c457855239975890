"""Checks of policies' knobs: each names the knob and the allowed range."""

from __future__ import annotations

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
