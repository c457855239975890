"""All policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sessiond.errors import UnknownPolicy
from sessiond.policies.base import Policy
from sessiond.policies.full import Full

POLICIES: dict[str, Callable[..., Policy]] = {"full": Full}


def parse(name: str, knobs: Mapping[str, Any]) -> Policy:
    """The policy of that name with those knobs. Raises UnknownPolicy for an unknown name or knob."""
    factory = POLICIES.get(name)
    if factory is None:
        raise UnknownPolicy(f"no policy {name!r}; there are {', '.join(sorted(POLICIES))}", policy=name)
    try:
        return factory(**knobs)
    except TypeError as error:
        raise UnknownPolicy(f"policy {name!r}: {error}", policy=name) from error
