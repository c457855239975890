"""Whether chosen positions lie where they may: a position outside would read other memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sessiond.kernels.native_library import BUILT, lib


def has_none_reference(positions: Tensor, end: int) -> bool:
    """Whether there are -1, no position, among integers of any shape. Raises ValueError if one is outside [-1, end)."""
    if not positions.numel():
        return False
    least = int(positions.min())
    if not -1 <= least <= int(positions.max()) < end:
        raise ValueError(f"positions outside [0, {end})")
    return least < 0


def has_none(positions: Tensor, end: int) -> bool:
    """`has_none_reference`, compiled where it can be: it is asked of every layer's choice at every step."""
    if (
        not BUILT
        or positions.dtype is not torch.int64
        or not positions.is_contiguous()
        or positions.device.type != "cpu"
    ):
        return has_none_reference(positions, end)
    found: int = lib.within(positions.data_ptr(), positions.numel(), -1, end)
    if found < 0:
        raise ValueError(f"positions outside [0, {end})")
    return found > 0
