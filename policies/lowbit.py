"""All of history in 8 or 4 bits: what every method that leaves tokens out has to beat at equal bytes.

Each token and head is quantized by itself, so nothing waits for later tokens. Asymmetric, because channels of keys have
offsets; in groups of 32 channels, because a few channels of keys are far larger than the others and would take the
steps of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sessiond.policies.base import LayerView, ModelFacts, Policy, Selector, Taken
from sessiond.policies.knobs import whole
from sessiond.policies.quantized import QuantizedKV, kv_bytes


@dataclass(frozen=True, slots=True)
class LowBit(Policy):
    """Read every earlier token in `bits` bits, with a scale and a zero for each `group` channels of a token."""

    bits: ClassVar[int]
    offloads: ClassVar[bool] = True
    group: int = 32

    def __post_init__(self) -> None:
        whole(self.name, "group", self.group, 1, 1 << 10)

    def index_bytes(self, model: ModelFacts) -> int:
        return kv_bytes(model, self.bits, self.group)

    def selector(self, layer: int, n_layers: int) -> Selector:
        return LowBitSelector(self.bits, self.group)


@dataclass(frozen=True, slots=True)
class Int8(LowBit):
    """A byte for each number."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8


@dataclass(frozen=True, slots=True)
class Int4(LowBit):
    """Half a byte for each number."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


class LowBitSelector(Selector):
    """The copy covers what came before the turn; a step only reads it."""

    def __init__(self, bits: int, group: int) -> None:
        self._copy = QuantizedKV(bits, group)

    @property
    def nbytes(self) -> int:
        return self._copy.nbytes

    def keep(self, n: int) -> None:
        self._copy.keep(n)

    def prompt(self, view: LayerView) -> None:
        self.rest(view)

    def step(self, view: LayerView) -> Taken | None:
        self.rest(view)
        return self._copy.all(view.turn_start) if view.turn_start else None

    def rest(self, view: LayerView) -> None:
        self._copy.extend(view.keys[:, : view.turn_start], view.values[:, : view.turn_start])
