"""Keys in few bits as an index: asymmetric, one scale and zero for each token and head (METHODS.md, first table).

A key of D numbers becomes D codes of `bits` bits, two or four to a byte, and two bf16 numbers. Scores against it rank
tokens; nothing is computed from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (2, 4, 8)


class QuantizedKeys:
    """Codes of keys at [0, n), one layer of one session; grows and shrinks at its end."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self.n = 0
        self._codes = torch.empty(0)
        self._scales = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, room to grow included."""
        return self._codes.nbytes + self._scales.nbytes

    @property
    def read_bytes(self) -> int:
        """Bytes of the codes of all n keys: what scores read."""
        return (self.nbytes // self._codes.shape[1]) * self.n if self.n else 0

    def keep(self, n: int) -> None:
        self.n = min(self.n, n)

    def extend(self, keys: Tensor) -> None:
        """Take what is new in `keys` [G, T, D]: those at [n, T)."""
        start, end = self.n, keys.shape[1]
        if end <= start:
            return
        new = keys[:, start:end].float()
        low, high = new.amin(-1, keepdim=True), new.amax(-1, keepdim=True)
        scale = ((high - low) / (2**self._bits - 1)).clamp(min=1e-8).to(torch.bfloat16)
        low = low.to(torch.bfloat16)
        codes = ((new - low.float()) / scale.float()).round().clamp(0, 2**self._bits - 1).to(torch.uint8)
        self._reserve(keys, end)
        self._codes[:, start:end] = self._pack(codes)
        self._scales[:, start:end] = torch.cat([scale, low], -1)
        self.n = end

    def scores(self, query: Tensor, n: int) -> Tensor:
        """query [G, R, D] against the first `n` keys: [G, R, n], fp32, without the softmax's scaling."""
        query = query.float()
        codes = self._unpack(self._codes[:, :n])[..., : query.shape[-1]].to(torch.float32)
        scale, low = self._scales[:, :n].float().unbind(-1)
        return query @ codes.transpose(-1, -2) * scale[:, None] + query.sum(-1, keepdim=True) * low[:, None]

    def _reserve(self, keys: Tensor, end: int) -> None:
        n_groups, _, head_dim = keys.shape
        if self._codes.ndim == 3 and end <= self._codes.shape[1]:
            return
        room = max(256, end + end // 4)
        codes = torch.zeros(n_groups, room, -(-head_dim * self._bits // 8), dtype=torch.uint8)
        scales = torch.zeros(n_groups, room, 2, dtype=torch.bfloat16)
        if self.n:
            codes[:, : self.n] = self._codes[:, : self.n]
            scales[:, : self.n] = self._scales[:, : self.n]
        self._codes, self._scales = codes, scales

    def _pack(self, codes: Tensor) -> Tensor:
        """[..., D] codes below 2^bits to [..., B] bytes, B = D * bits / 8 rounded up; the first in the lowest bits."""
        parts = F.pad(codes, (0, -codes.shape[-1] % (8 // self._bits))).chunk(8 // self._bits, -1)
        packed = parts[0].clone()
        for i, part in enumerate(parts[1:], 1):
            packed |= part << (i * self._bits)
        return packed

    def _unpack(self, packed: Tensor) -> Tensor:
        mask = 2**self._bits - 1
        return torch.cat([packed >> (i * self._bits) & mask for i in range(8 // self._bits)], -1)
