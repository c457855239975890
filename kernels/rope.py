"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of keys, and its inverse.

As transformers' models apply it: the first R channels of a head are two halves that rotate together, the others stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Angles of position p are p * `inv_freq` [R / 2] fp32; `scale` multiplies what is rotated."""

    inv_freq: Tensor
    scale: float = 1.0
    _tables: list[Tensor] = field(default_factory=list, repr=False)

    def table(self, n: int) -> Tensor:
        """Cosines and sines, scaled, of at least the first `n` positions: [2, N, R / 2] fp32. Made anew to grow."""
        if not self._tables or self._tables[0].shape[1] < n:
            angles = torch.arange(1 << max(10, (n - 1).bit_length())).float()[:, None] * self.inv_freq
            self._tables[:] = [torch.stack([angles.cos(), angles.sin()]) * self.scale]
        return self._tables[0]

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """keys [..., K, D] fp32 at `positions` [..., K] (of the same leading shape, or [K])."""
        return self._turned(keys, positions, 1.0, self.scale)

    def undo(self, keys: Tensor, positions: Tensor) -> Tensor:
        """What `rotate` makes into `keys` [..., K, D] fp32."""
        return self._turned(keys, positions, -1.0, 1 / self.scale)

    def _turned(self, keys: Tensor, positions: Tensor, direction: float, scale: float) -> Tensor:
        n_half = self.inv_freq.shape[0]
        angles = positions[..., None].float() * self.inv_freq
        cos, sin = angles.cos() * scale, angles.sin() * (scale * direction)
        first, second, rest = keys[..., :n_half], keys[..., n_half : 2 * n_half], keys[..., 2 * n_half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
