"""All policies by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sessiond.errors import InvalidConfig, UnknownPolicy
from sessiond.policies.adakv import AdaKV
from sessiond.policies.auto import Auto
from sessiond.policies.base import Policy
from sessiond.policies.compose import ByPrior, Layers, Viewed
from sessiond.policies.full import Full
from sessiond.policies.h2o import H2O
from sessiond.policies.kivi import Kivi
from sessiond.policies.kvzip import KVzip
from sessiond.policies.lowbit import Int4, Int8
from sessiond.policies.quest import Quest
from sessiond.policies.rocketkv import RocketKV
from sessiond.policies.shadowkv import ShadowKV
from sessiond.policies.sieve import Sieve
from sessiond.policies.snapkv import SnapKV
from sessiond.policies.window import Window

# Deeper ones would not fit into the messages that tell of them: protobuf reads a hundred levels.
MOST_DEPTH = 8

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "window": Window,
    "h2o": H2O,
    "snapkv": SnapKV,
    "adakv": AdaKV,
    "quest": Quest,
    "rocketkv": RocketKV,
    "sieve": Sieve,
    "auto": Auto,
    "int8": Int8,
    "int4": Int4,
    "kivi": Kivi,
    "layers": Layers,
    "viewed": Viewed,
    "prior": ByPrior,
    "shadowkv": ShadowKV,
    "kvzip": KVzip,
}


def parse(name: str, knobs: Mapping[str, Any], depth: int = 0) -> Policy:
    """The policy of that name with those knobs; whole numbers may come as 4.0, as protobuf's Struct has them.

    A knob that is an object with a `name` is itself a policy, `depth` deep in others. Raises UnknownPolicy for an
    unknown name or knob, InvalidConfig for a knob outside its range.
    """
    factory = POLICIES.get(name)
    if factory is None:
        raise UnknownPolicy(f"no policy {name!r}; there are {', '.join(sorted(POLICIES))}", policy=name)
    known = [field.name for field in fields(factory)]  # type: ignore[arg-type]
    if unknown := sorted(knobs.keys() - set(known)):
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UnknownPolicy(f"policy {name!r} has no knob {', '.join(unknown)}; {has}", policy=name, knob=unknown[0])
    if depth > MOST_DEPTH:
        told = f"policy {name!r}: policies may be within each other {MOST_DEPTH} deep at most"
        raise InvalidConfig(told, policy=name, knob="of", range=f"{MOST_DEPTH} deep")
    return factory(**{knob: _knob(value, depth) for knob, value in knobs.items()})


def stored(policy: Mapping[str, Any]) -> Policy:
    """The policy of a session's record: {"name", "knobs"}."""
    return parse(policy["name"], policy["knobs"])


def _knob(value: Any, depth: int) -> Any:
    """A knob as a policy takes it: an object with a name is a policy within it."""
    if isinstance(value, Mapping):
        inner = dict(value)
        name = inner.pop("name", None)
        if isinstance(name, str):
            return parse(name, inner, depth + 1)
        return {key: _knob(part, depth) for key, part in inner.items()}
    if isinstance(value, list | tuple):
        return tuple(_knob(part, depth) for part in value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
