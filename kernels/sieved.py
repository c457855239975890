"""What sieve chooses for one token in every layer of a compiled step (kernels/native/sieved.h).

The reference is kernels/heaviest.py, asked layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sessiond.kernels.heaviest import NOTHING, TIE, Enough
from sessiond.kernels.key_codes import check_tiles
from sessiond.kernels.native_library import ffi


@dataclass(frozen=True, slots=True, eq=False)
class SieveIndex:
    """Codes of a layer's earlier keys in `tiles` (kernels/key_codes.py), with room for one more, and what is enough."""

    tiles: Tensor
    bits: int
    enough: Enough


class Sieved:
    """Asked once, for one token of one session at `position`; the answer is there when the layers are computed."""

    def __init__(
        self, indexes: Sequence[SieveIndex | None], n_groups: int, head_dim: int, turn_start: int, position: int
    ) -> None:
        """`indexes` of every layer; None: it attends to everything. Raises ValueError for tiles that do not fit."""
        if not 0 <= turn_start <= position:
            raise ValueError(f"a turn that begins at {turn_start}, behind the token at {position}")
        for index in indexes:
            if index is not None:
                check_tiles(index.tiles, n_groups, position + 1, head_dim, index.bits)
        self._indexes = list(indexes)  # whose tiles the kernels read
        self._n_groups = n_groups
        most = max((index.enough.most for index in indexes if index is not None), default=0)
        self._positions = torch.empty(len(indexes), n_groups * min(most, turn_start), dtype=torch.int64)
        self._counts: Any = ffi.new("int64_t[]", [-1] * len(indexes))
        self._layers: Any = ffi.new("struct sieve_index[]", [_told(index) for index in indexes])
        layers, counts = (int(ffi.cast("uintptr_t", array)) for array in (self._layers, self._counts))
        stride = self._positions.shape[1]
        told = (layers, self._positions.data_ptr(), counts, turn_start, stride, 0, TIE, NOTHING)
        self._struct: Any = ffi.new("struct sieved *", told)

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", self._struct))

    @property
    def seconds(self) -> float:
        """Time that choosing took."""
        return float(self._struct.nanoseconds) / 1e9

    def chosen(self, layer: int) -> Tensor | None:
        """Positions [G, K], ascending in each row; None: the layer was not asked."""
        count: int = self._counts[layer]
        return None if count < 0 else self._positions[layer, : self._n_groups * count].view(self._n_groups, count)


def _told(index: SieveIndex | None) -> tuple[float, ...]:
    """`struct sieve_index`."""
    if index is None:
        return (0, 0, 0, 0, 0, 0.0)
    tiles, enough = index.tiles, index.enough
    return tiles.data_ptr(), tiles.stride(0), index.bits, enough.least, enough.most, enough.mass
