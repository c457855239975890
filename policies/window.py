"""The first tokens and the last ones: StreamingLLM (Xiao et al. 2023, arXiv 2309.17453), at original positions.

What lies between is not attended, and not lost: the next turn may look at it under another policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sessiond.policies.base import LayerView, Policy, Selector
from sessiond.policies.knobs import whole


@dataclass(frozen=True, slots=True)
class Window(Policy):
    """Attend to `sinks` first tokens and the `recent` newest ones, the turn's own among them."""

    name: ClassVar[str] = "window"
    sinks: int = 4
    recent: int = 508

    def __post_init__(self) -> None:
        whole(self.name, "sinks", self.sinks, 0, 1 << 20)
        whole(self.name, "recent", self.recent, 1, 1 << 20)

    @property
    def dense_prompt(self) -> bool:
        return False

    def selector(self, layer: int, n_layers: int) -> Selector:
        return WindowSelector(self)


class WindowSelector(Selector):
    """Chooses for all queries of a piece at once."""

    def __init__(self, policy: Window) -> None:
        self._policy = policy

    def prompt(self, view: LayerView) -> Tensor:
        sinks = torch.arange(min(self._policy.sinks, view.turn_start))
        first = max(len(sinks), view.start + 1 - self._policy.recent)  # for the first query; the others see more
        recent = torch.arange(min(first, view.turn_start), view.turn_start)
        return torch.cat([sinks, recent]).expand(view.keys.shape[0], -1)

    step = prompt
