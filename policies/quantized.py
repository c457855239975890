"""Keys and values in few bits: asymmetric, a scale and a zero for each group of numbers (METHODS.md, first table).

A row of D numbers becomes D codes of `bits` bits, two or four to a byte, and two bf16 numbers for each group. They
stand in for the exact ones (QuantizedKV); keyindex.py has the codes that only rank tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sessiond.kernels.coded import CodedRows
from sessiond.kernels.quantize import quantize
from sessiond.policies.base import ModelFacts, Taken
from sessiond.policies.choosing import first


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
        return self.rows(n).at(None, dtype)

    def rows(self, n: int) -> CodedRows:
        """The first `n` rows, or as many as there are, as they are: a view that holds until the next change."""
        n = min(n, self.n)
        return CodedRows(self._codes[:, :n], self._scales[:, :n], self._bits, self._group, self._width)

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

    def all(self, n: int) -> Taken:
        """The first `n` tokens, n > 0, in their codes."""
        keys = self._keys.rows(n)
        return self._taken(first(n, len(keys.codes)), keys, n, whole=True)

    def at(self, positions: Tensor, n: int) -> Taken:
        """Those at `positions` [G, K] of the first `n` tokens, n > 0; -1 is no position."""
        return self._taken(positions, self._keys.rows(n), n, whole=False)

    def _taken(self, positions: Tensor, keys: CodedRows, n: int, *, whole: bool) -> Taken:
        nbytes = self._keys.used(n) + self._values.used(n)
        return Taken(positions, keys, self._values.rows(n), self._form, nbytes, whole=whole)
