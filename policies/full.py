"""Every token takes part in attention, exactly: the reference for all other policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Full:
    """Attend to all tokens. No knobs."""

    name: ClassVar[str] = "full"
    dense_prompt: ClassVar[bool] = True

    def knobs(self) -> dict[str, Any]:
        return {}

    def selector(self, layer: int, n_layers: int) -> None:
        return None
