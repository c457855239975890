"""What a policy is: a frozen value that decides which tokens take part in attention, and in which form."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol


class Policy(Protocol):
    """A frozen dataclass whose fields are its knobs. No policy decides what exists: no token is ever lost."""

    name: ClassVar[str]

    def knobs(self) -> dict[str, Any]:
        """The knobs as JSON values; `registry.parse(name, knobs)` gives an equal policy."""
        ...
