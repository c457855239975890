"""Every token takes part in attention, exactly: the reference for all other policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sessiond.policies.base import ModelFacts, Policy


@dataclass(frozen=True, slots=True)
class Full(Policy):
    """Attend to all tokens. No knobs."""

    name: ClassVar[str] = "full"

    def fits(self, model: ModelFacts) -> None:
        """Every model."""

    def selector(self, layer: int, n_layers: int) -> None:
        return None
