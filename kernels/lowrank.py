"""Keys of chosen tokens from coordinates of low rank, back at their positions (ShadowKV, arXiv 2410.21465)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sessiond.kernels.blockweights import BLOCK
from sessiond.kernels.matrix import Matrix, supported
from sessiond.kernels.native_library import ffi, lib
from sessiond.kernels.rope import Rope

MOST_DIM, MOST_RANK = 256, 1024  # of kernels/native/lowrank.c


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Keys of n tokens before their rotation, about: `coordinates` [n, R] in `basis` [G * D, R], both bf16, and `mean`
    [G * D] fp32."""

    coordinates: Tensor
    basis: Tensor
    mean: Tensor

    def parts(self, n_groups: int) -> Tensor:
        """The basis of each group: [G, D, R]."""
        return self.basis.view(n_groups, -1, self.basis.shape[1])

    def plain(self, positions: Tensor) -> Tensor:
        """What the keys at `positions` [G, K] are about: [G, K, D] fp32."""
        n_groups = positions.shape[0]
        return self.coordinates[positions].float() @ self.parts(n_groups).float().mT + self.mean.view(n_groups, 1, -1)


class Bases:
    """A basis as the compiled kernel takes it: a matrix a group. It never changes, so copies are the same."""

    def __init__(self, factors: Factors, n_groups: int) -> None:
        self.matrices = [Matrix(part.contiguous()) for part in factors.parts(n_groups)]
        self.struct: Any = ffi.new("struct matrix[]", [matrix.struct[0] for matrix in self.matrices])

    def __deepcopy__(self, memo: dict[int, Any]) -> Bases:
        return self


def low_rank_keys_reference(factors: Factors, positions: Tensor, exact: Tensor, keys: Tensor, rope: Rope) -> Tensor:
    """Keys [G, K, D] at `positions` [G, K]: those of `keys` [G, T, D] where `exact` [G, K], else from the factors."""
    found = rope.rotate(factors.plain(positions), positions).to(keys.dtype)
    groups, places = exact.nonzero(as_tuple=True)
    found[groups, places] = keys[groups, positions[groups, places]]
    return found


def bases_of(factors: Factors, n_groups: int) -> Bases | None:
    """None if the compiled kernel does not take this basis here."""
    part = factors.parts(n_groups)[0]
    fits = part.shape[0] % 16 == 0 and part.shape[0] <= MOST_DIM and part.shape[1] <= MOST_RANK
    return Bases(factors, n_groups) if fits and part.shape[1] % BLOCK == 0 and supported(part) else None


def low_rank_keys(
    factors: Factors, bases: Bases | None, positions: Tensor, exact: Tensor, keys: Tensor, rope: Rope
) -> Tensor:
    """`low_rank_keys_reference`, compiled if there are `bases`. Raises ValueError where there are no factors."""
    rows = keys.dtype is torch.bfloat16 and keys.device.type == "cpu" and keys.stride()[1:] == (keys.shape[2], 1)
    if bases is None or not rows or len(factors.coordinates) > keys.shape[1]:
        return low_rank_keys_reference(factors, positions, exact, keys, rope)
    n, (n_groups, n_chosen), head_dim = len(factors.coordinates), positions.shape, keys.shape[2]
    if keys.shape[0] != n_groups or exact.shape != positions.shape or len(factors.mean) != n_groups * head_dim:
        raise ValueError(f"positions {tuple(positions.shape)} do not fit keys {tuple(keys.shape)}")
    angles, positions = rope.table(n), positions.contiguous()
    marks = exact.to(torch.uint8).contiguous()
    out = keys.new_empty(n_groups, n_chosen, head_dim)
    pointers = (factors.mean, factors.coordinates, angles, positions, marks, keys, out)
    numbers = (
        n_groups,
        head_dim,
        bases.matrices[0].n_in,
        n,
        angles.shape[1],
        angles.shape[2],
        n_chosen,
        keys.stride(0),
    )
    job = ffi.new("struct low_rank *", (bases.struct, *(part.data_ptr() for part in pointers), *numbers))
    if lib.low_rank_keys(job, torch.get_num_threads()):
        raise ValueError(f"a position outside of the {n} that have factors")
    return out
