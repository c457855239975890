"""Choices that no daemon can make, or should: the ceiling and the floor of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sessiond.policies.base import LayerView, Policy, Scan, Selector
from sessiond.policies.choosing import summed_weights, top


@dataclass(frozen=True, slots=True)
class Oracle(Policy):
    """The tokens with the highest true weights, at each step, head by head: reads every key exactly."""

    name: ClassVar[str] = "oracle"
    budget: int = 256

    def selector(self, layer: int, n_layers: int) -> Selector:
        return _OracleSelector(self.budget)


class _OracleSelector(Selector):
    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._scan: Scan | None = None

    @property
    def scan(self) -> Scan | None:
        """All keys: what knowing costs."""
        return self._scan

    def step(self, view: LayerView) -> Tensor:
        self._scan = Scan("exact", view.turn_start, view.keys[:, : view.turn_start].nbytes)
        places = torch.arange(view.keys.shape[1])
        weights = summed_weights(view.query, places[view.start :], view.keys, places, view.scaling)
        return top(weights[:, : view.turn_start], self._budget)


@dataclass(frozen=True, slots=True)
class Random(Policy):
    """Other tokens at each step, drawn anew."""

    name: ClassVar[str] = "random"
    budget: int = 256

    @property
    def dense_prompt(self) -> bool:
        return False

    def selector(self, layer: int, n_layers: int) -> Selector:
        return _RandomSelector(self.budget, layer)


class _RandomSelector(Selector):
    def __init__(self, budget: int, seed: int) -> None:
        self._budget = budget
        self._draw = torch.Generator().manual_seed(seed)

    def prompt(self, view: LayerView) -> Tensor:
        return top(torch.rand(view.keys.shape[0], view.turn_start, generator=self._draw), self._budget)

    step = prompt
