"""Rows of numbers in few bits, as attention reads them: codes, and a scale and a zero for each group of numbers.

Byte i of a row holds number i in its lowest bits, and in the higher ones number i + B, i + 2 B ...; B bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 4, 8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The codes [..., D] of bytes [..., B]."""
    mask = 2**bits - 1
    parts = [packed >> (i * bits) & mask for i in range(8 // bits)]
    return torch.cat(parts, -1)[..., :width]


@dataclass(frozen=True, slots=True, eq=False)
class CodedRows:
    """Row p of a head is that of position p: codes [G, N, B] uint8, scales [G, N, 2 P] bf16 (P scales, then P zeros).

    `group`: numbers that share a scale, of `width` = D in a row; 0: all. A view of memory that grows and changes: it
    holds for the step it was taken in.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    width: int

    def check(self, n_groups: int, n: int, width: int) -> None:
        """Raises ValueError unless these are at least `n` rows of `width` numbers of so many heads."""
        n_bytes, n_scales = -(-width * self.bits // 8), 2 * -(-width // (self.group or width))
        (_, n_codes, _), (_, n_scaled, _) = self.codes.shape, self.scales.shape
        right = self.codes.shape == (n_groups, n_codes, n_bytes) and self.scales.shape == (n_groups, n_scaled, n_scales)
        if not right or self.width != width or min(n_codes, n_scaled) < n or self.bits not in BITS:
            told = f"{tuple(self.codes.shape)} with scales {tuple(self.scales.shape)}"
            raise ValueError(f"codes of shape {told} where {n} rows of {width} numbers are read")

    def at(self, positions: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The numbers of the rows at `positions` [G, K], -1 as 0; None: of all. [G, K, D]."""
        codes, scales = self.codes, self.scales
        if positions is not None:
            index = positions.clamp(min=0)[..., None]
            codes, scales = (part.gather(1, index.expand(-1, -1, part.shape[2])) for part in (codes, scales))
        scale, low = (self._spread(part) for part in scales.float().chunk(2, -1))
        return (unpack(codes, self.bits, self.width).float() * scale + low).to(dtype)

    def _spread(self, of_groups: Tensor) -> Tensor:
        """[G, N, P] to the numbers of each group: [G, N, D]; one group is left as it is."""
        if of_groups.shape[-1] == 1:
            return of_groups
        return of_groups.repeat_interleave(self.group, -1)[..., : self.width]
