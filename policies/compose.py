"""Policies made of policies: by layer, read in few bits, or narrowed to what the session's prior keeps.

A knob that is an object with a `name` is a policy (registry.parse), these three among them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sessiond.errors import InvalidConfig
from sessiond.policies.base import ModelFacts, Policy, Selector, named
from sessiond.policies.full import Full
from sessiond.policies.knobs import one_of, share
from sessiond.policies.narrowed import PriorSelector
from sessiond.policies.quantized import kv_bytes
from sessiond.policies.viewed import GROUP, ViewedSelector

_LAYERS = re.compile(r"(\d{1,6})(-(\d{1,6})?)?")
_RULES = 'a list of one or more {"layers": "0-1" or "5" or "2-", "policy": {"name": ...}}'


@dataclass(frozen=True, slots=True)
class Rule:
    """`policy` in the layers from `first` to `last`; None: in all from `first` on."""

    first: int
    last: int | None
    policy: Policy

    @property
    def layers(self) -> str:
        if self.last is None:
            return f"{self.first}-"
        return str(self.first) if self.last == self.first else f"{self.first}-{self.last}"

    def holds(self, layer: int) -> bool:
        return self.first <= layer and (self.last is None or layer <= self.last)


@dataclass(frozen=True, slots=True)
class Layers(Policy):
    """Each layer under the policy of the first of `rules` that names it, `otherwise` where none does."""

    name: ClassVar[str] = "layers"
    rules: tuple[Rule, ...] = ()
    otherwise: Policy = field(default_factory=Full)

    def __post_init__(self) -> None:
        """Rules come as objects, too."""
        given: Any = self.rules
        if not isinstance(given, tuple) or not given:
            raise _refused(self.name, "rules", given, _RULES)
        object.__setattr__(self, "rules", tuple(_rule(self.name, rule) for rule in given))
        _check_policy(self.name, "otherwise", self.otherwise)

    @property
    def offloads(self) -> bool:  # type: ignore[override]
        return all(part.offloads for part in self._parts)

    @property
    def dense_prompt(self) -> bool:
        return all(part.dense_prompt for part in self._parts)

    @property
    def wants_prior(self) -> bool:  # type: ignore[override]
        return any(part.wants_prior for part in self._parts)

    @property
    def prior_chunk(self) -> int:
        return min(part.prior_chunk for part in self._parts)

    def knobs(self) -> dict[str, Any]:
        rules = [{"layers": rule.layers, "policy": named(rule.policy)} for rule in self.rules]
        return {"rules": rules, "otherwise": named(self.otherwise)}

    def fits(self, model: ModelFacts) -> None:
        """Every part must fit, and every rule name layers that see all of history."""
        Policy.fits(self, model)
        for rule in self.rules:
            last = model.n_layers - 1 if rule.last is None else rule.last
            named = range(rule.first, last + 1)
            seen = [layer in model.attending for layer in named]
            if not (any(seen) if rule.last is None else all(seen)):
                told = f"layers that see all of history: {_told(model.attending)}"
                raise _refused(self.name, "rules", rule.layers, told)
        for part in self._parts:
            part.fits(model)

    def index_bytes(self, model: ModelFacts) -> int:
        """As if the part that takes most were in all layers."""
        return max(part.index_bytes(model) for part in self._parts)

    def selector(self, layer: int, n_layers: int) -> Selector | None:
        policy = next((rule.policy for rule in self.rules if rule.holds(layer)), self.otherwise)
        return policy.selector(layer, n_layers)

    @property
    def _parts(self) -> list[Policy]:
        return [*(rule.policy for rule in self.rules), self.otherwise]


@dataclass(frozen=True, slots=True)
class Around(Policy):
    """A policy around another: what it does not say itself is as `of` says."""

    of: Policy = field(default_factory=Full)

    def __post_init__(self) -> None:
        _check_policy(self.name, "of", self.of)

    @property
    def offloads(self) -> bool:  # type: ignore[override]
        return self.of.offloads

    @property
    def dense_prompt(self) -> bool:
        return self.of.dense_prompt

    @property
    def wants_prior(self) -> bool:  # type: ignore[override]
        return self.of.wants_prior

    @property
    def prior_chunk(self) -> int:
        return self.of.prior_chunk

    def fits(self, model: ModelFacts) -> None:
        Policy.fits(self, model)
        self.of.fits(model)

    def index_bytes(self, model: ModelFacts) -> int:
        return self.of.index_bytes(model)


@dataclass(frozen=True, slots=True)
class Viewed(Around):
    """What `of` chooses, read in `bits` bits; where it chooses all, all in that form."""

    name: ClassVar[str] = "viewed"
    offloads: ClassVar[bool] = True
    bits: int = 4

    def __post_init__(self) -> None:
        Around.__post_init__(self)
        one_of(self.name, "bits", self.bits, (8, 4, 2))

    def index_bytes(self, model: ModelFacts) -> int:
        return self.of.index_bytes(model) + kv_bytes(model, self.bits, GROUP)

    def selector(self, layer: int, n_layers: int) -> Selector:
        return ViewedSelector(self.of.selector(layer, n_layers) or Selector(), self.bits, dense=self.dense_prompt)


@dataclass(frozen=True, slots=True)
class ByPrior(Around):
    """Of what `of` chooses, the `share` of each head's tokens that the session's prior scores highest.

    Tokens without scores stay; without a prior this is `of`.
    """

    name: ClassVar[str] = "prior"
    wants_prior: ClassVar[bool] = True
    share: float = 0.3

    def __post_init__(self) -> None:
        Around.__post_init__(self)
        share(self.name, "share", self.share)

    def selector(self, layer: int, n_layers: int) -> Selector:
        inner = self.of.selector(layer, n_layers) or Selector()
        return PriorSelector(inner, layer, self.share, dense=self.dense_prompt)


def _rule(policy: str, given: Any) -> Rule:
    """Raises InvalidConfig."""
    if isinstance(given, Rule):
        return given
    if not isinstance(given, Mapping) or given.keys() != {"layers", "policy"} or not isinstance(given["layers"], str):
        raise _refused(policy, "rules", given, _RULES)
    match = _LAYERS.fullmatch(given["layers"])
    if match is None:
        raise _refused(policy, "rules", given["layers"], _RULES)
    first, dash, last = int(match[1]), match[2], match[3]
    if last is not None and int(last) < first:
        raise _refused(policy, "rules", given["layers"], _RULES)
    _check_policy(policy, "rules", given["policy"])
    return Rule(first, (int(last) if last else None) if dash else first, given["policy"])


def _check_policy(policy: str, knob: str, value: object) -> None:
    """Raises InvalidConfig unless `value` is a policy that settles on no other: that is done for a turn as a whole."""
    if not isinstance(value, Policy) or type(value).settle_on is not Policy.settle_on:
        raise _refused(policy, knob, value, 'a policy other than auto: {"name": ..., and its knobs}')


def _refused(policy: str, knob: str, value: object, allowed: str) -> InvalidConfig:
    return InvalidConfig(
        f"policy {policy!r}: {knob} must be {allowed}, not {value!r}", policy=policy, knob=knob, range=allowed
    )


def _told(layers: tuple[int, ...]) -> str:
    """As an interval where they have no gaps."""
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"[{layers[0]}, {layers[-1]}]"
    return ", ".join(str(layer) for layer in layers)
