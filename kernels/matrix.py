"""A weight laid out for products with any number of rows, in 16, 8 or 4 bits (kernels/native/matrix.h).

Few rows are bound by reading the weight, so it is read once and in as few bits as it has. A row's result does not
depend on how many rows there are, nor on threads. The references are F.linear and `linear_blocks_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sessiond.kernels.blockweights import BLOCK, BlockWeights
from sessiond.kernels.native_library import BUILT, ffi, lib

LANES = 16  # outputs of a tile
GATE_RUN = 32  # outputs of a gate, and then of what it gates


class Matrix:
    """A weight [n_out, n_in] of bf16, or of codes, and a bias [n_out]; n_in is a multiple of 32.

    `struct` is what the compiled kernels take; it lives as long as this. Needs the compiled kernels (`supported`).
    """

    def __init__(self, weight: Tensor | BlockWeights, bias: Tensor | None = None) -> None:
        """Raises ValueError for a weight that no layout fits."""
        if not supported(weight):
            raise ValueError("a matrix is bf16 or in blocks, and has a multiple of 32 inputs")
        self.n_out, self.n_in = weight.shape
        self.bits = weight.bits if isinstance(weight, BlockWeights) else 16
        scales = lows = None
        if isinstance(weight, BlockWeights):
            codes = _tiled_codes(weight.codes, weight.bits)
            scales = _tiled_sides(weight.scales)
            lows = None if weight.lows is None else _tiled_sides(weight.lows)
        else:
            codes = _tiled_pairs(weight.detach())
        self._held = codes, scales, lows, None if bias is None else bias.detach().float().contiguous()
        self.struct: Any = ffi.new("struct matrix *")
        self.struct.bits, self.struct.n_in, self.struct.n_out = self.bits, self.n_in, self.n_out
        for name, part in zip(("codes", "scales", "lows", "bias"), self._held, strict=True):
            setattr(self.struct, name, 0 if part is None else part.data_ptr())

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return sum(part.nbytes for part in self._held if part is not None)

    def product(self, x: Tensor) -> Tensor:
        """x [..., n_in] bf16 @ weight.T + bias: [..., n_out] fp32."""
        if x.dtype is not torch.bfloat16 or x.shape[-1] != self.n_in or x.device.type != "cpu":
            raise ValueError(f"x of shape {tuple(x.shape)} and type {x.dtype} on {x.device}, for {self.n_in} inputs")
        x = x.contiguous()
        rows = x.numel() // self.n_in
        out = torch.empty((*x.shape[:-1], self.n_out))
        work = torch.empty(lib.matrix_work(rows, self.n_in), dtype=torch.uint8)
        lib.matrix_product(self.struct, x.data_ptr(), rows, out.data_ptr(), work.data_ptr(), torch.get_num_threads())
        return out


def supported(weight: Tensor | BlockWeights) -> bool:
    """Whether there is a compiled layout for this weight here."""
    if not BUILT or weight.shape[1] % BLOCK or not weight.shape[0]:
        return False
    return isinstance(weight, BlockWeights) or (weight.dtype is torch.bfloat16 and weight.device.type == "cpu")


def stacked(weights: Sequence[Tensor | BlockWeights]) -> Tensor | BlockWeights | None:
    """Weights with the same inputs as one, their outputs one after the other. None if they are of different kinds."""
    return _joined(weights, lambda parts: torch.cat(parts))


def interleaved(gate: Tensor | BlockWeights, up: Tensor | BlockWeights) -> Tensor | BlockWeights | None:
    """Two weights [n_out, n_in] as one, by turns 32 outputs of each; n_out is a multiple of 32."""

    def turns(parts: list[Tensor]) -> Tensor:
        runs = [part.view(-1, GATE_RUN, part.shape[1]) for part in parts]
        return torch.stack(runs, 1).flatten(0, 2)

    return _joined([gate, up], turns)


def _joined(weights: Sequence[Tensor | BlockWeights], join: Any) -> Tensor | BlockWeights | None:
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    blocks = [weight for weight in weights if isinstance(weight, BlockWeights)]
    if not blocks:
        joined: Tensor = join([weight.detach() for weight in dense])
        return joined
    if dense or len({weight.bits for weight in blocks}) > 1:
        return None
    lows = [weight.lows for weight in blocks if weight.lows is not None]
    codes, scales = join([weight.codes for weight in blocks]), join([weight.scales for weight in blocks])
    return BlockWeights(blocks[0].bits, codes, scales, join(lows) if lows else None)


def _in_tiles(rows: Tensor) -> Tensor:
    """[n_out, N] to [tiles, 16, N], the last tile filled up with zeros."""
    missing = -rows.shape[0] % LANES
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    return rows.view(-1, LANES, rows.shape[1])


def _tiled_pairs(weight: Tensor) -> Tensor:
    tiles = _in_tiles(weight)
    return tiles.view(*tiles.shape[:2], -1, 2).transpose(1, 2).contiguous()


def _tiled_codes(codes: Tensor, bits: int) -> Tensor:
    tiles = _in_tiles(codes)
    if bits == 8:
        return tiles.view(*tiles.shape[:2], -1, 4).transpose(1, 2).contiguous()
    # [tile, output, block, half, four of a half, code] to [tile, block, four, output, code], two halves a byte
    parts = tiles.view(*tiles.shape[:2], -1, 2, 4, 4).permute(0, 2, 4, 1, 5, 3)
    return (parts[..., 0] | parts[..., 1] << 4).contiguous()


def _tiled_sides(sides: Tensor) -> Tensor:
    return _in_tiles(sides).transpose(1, 2).contiguous()
