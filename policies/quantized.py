"""Keys and values in few bits: asymmetric, a scale and a zero for each group of numbers (METHODS.md, first table).

A row of D numbers becomes D codes of `bits` bits, two or four to a byte, and two bf16 numbers for each group. They
stand in for the exact ones (QuantizedKV); keyindex.py has the codes that only rank tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sessiond.kernels.quantize import quantize
from sessiond.policies.base import ModelFacts, Taken

BITS = (2, 4, 8)


def bytes_per_row(width: int, bits: int, group: int = 0) -> int:
    """Codes, scales and zeros of one row of `width` numbers."""
    n_groups = -(-width // group) if group else 1
    return -(-width * bits // 8) + n_groups * 2 * torch.bfloat16.itemsize


def kv_bytes(model: ModelFacts, bits: int, group: int) -> int:
    """Of a token's keys and values in all layers that see all of history, with the codes' room to grow."""
    rows = 2 * len(model.attending) * model.n_kv_heads
    return rows * bytes_per_row(model.head_dim, bits, group) * 5 // 4


class Codes:
    """Codes of the rows at [0, n) of a [G, N, D], one layer of one session; grows and shrinks at its end.

    `group`: numbers of a row that share scale and zero, P groups in a row; 0: the whole row.
    """

    def __init__(self, bits: int, group: int = 0) -> None:
        self._bits = bits
        self._group = group
        self._width = 0
        self.n = 0
        self._codes = torch.empty(0)
        self._scales = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, room to grow included."""
        return self._codes.nbytes + self._scales.nbytes

    def used(self, n: int) -> int:
        """Bytes of the first `n` rows."""
        return self._codes[:, :n].nbytes + self._scales[:, :n].nbytes if n else 0

    def keep(self, n: int) -> None:
        self.n = min(self.n, n)

    def extend(self, rows: Tensor) -> None:
        """Take what is new in `rows` [G, N, D]: those at [n, N)."""
        start, end = self.n, rows.shape[1]
        if end <= start:
            return
        self._reserve(rows, end)
        group = self._group or self._width
        quantize(rows[:, start:], self._codes[:, start:end], self._scales[:, start:end], self._bits, group)
        self.n = end

    def read(self, n: int, dtype: torch.dtype) -> Tensor:
        """The first `n` rows: [G, n, D]."""
        return self._plain(self._codes[:, :n], self._scales[:, :n], dtype)

    def at(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows at `positions` [G, K]: [G, K, D]."""
        index = positions[..., None]
        codes, scales = (part.gather(1, index.expand(-1, -1, part.shape[2])) for part in (self._codes, self._scales))
        return self._plain(codes, scales, dtype)

    def _plain(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        scale, low = (self._spread(part) for part in scales.float().chunk(2, -1))
        return (self._unpack(codes).float() * scale + low).to(dtype)

    def _spread(self, of_groups: Tensor) -> Tensor:
        """[G, N, P] to the numbers of each group: [G, N, D]; one group is left as it is."""
        if of_groups.shape[-1] == 1:
            return of_groups
        return of_groups.repeat_interleave(self._group, -1)[..., : self._width]

    def _reserve(self, rows: Tensor, end: int) -> None:
        n_groups, _, self._width = rows.shape
        if self._codes.ndim == 3 and end <= self._codes.shape[1]:
            return
        room = max(256, end + end // 4)
        n_scales = 2 * -(-self._width // (self._group or self._width))
        codes = torch.zeros(n_groups, room, -(-self._width * self._bits // 8), dtype=torch.uint8)
        scales = torch.zeros(n_groups, room, n_scales, dtype=torch.bfloat16)
        if self.n:
            codes[:, : self.n] = self._codes[:, : self.n]
            scales[:, : self.n] = self._scales[:, : self.n]
        self._codes, self._scales = codes, scales

    def _unpack(self, packed: Tensor) -> Tensor:
        """The codes [..., D] of bytes [..., B]."""
        mask = 2**self._bits - 1
        parts = [packed >> (i * self._bits) & mask for i in range(8 // self._bits)]
        return torch.cat(parts, -1)[..., : self._width]


class QuantizedKV:
    """Keys and values of the tokens at [0, n), each in groups of `group` channels of a token and head."""

    def __init__(self, bits: int, group: int) -> None:
        self._form = f"int{bits}"
        self._keys, self._values = Codes(bits, group), Codes(bits, group)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, room to grow included."""
        return self._keys.nbytes + self._values.nbytes

    def keep(self, n: int) -> None:
        self._keys.keep(n)
        self._values.keep(n)

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Take what is new in keys and values [G, T, D]."""
        self._keys.extend(keys)
        self._values.extend(values)

    def all(self, n: int, dtype: torch.dtype) -> Taken:
        """The first `n` tokens, n > 0."""
        keys, values = self._keys.read(n, dtype), self._values.read(n, dtype)
        return self._taken(torch.arange(n).expand(len(keys), -1), keys, values, n)

    def at(self, positions: Tensor, n: int, dtype: torch.dtype) -> Taken:
        """Those at `positions` [G, K] of the first `n` tokens, n > 0; -1 is no position."""
        there = positions.clamp(min=0)
        return self._taken(positions, self._keys.at(there, dtype), self._values.at(there, dtype), n)

    def _taken(self, positions: Tensor, keys: Tensor, values: Tensor, n: int) -> Taken:
        return Taken(positions, keys, values, self._form, self._keys.used(n) + self._values.used(n))
