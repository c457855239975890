"""Keys from coordinates of low rank, rotated to their positions, on a GPU: ShadowKV (Sun et al. 2024, 2410.21465).

The products of `policies.lowrank.LowRank.take` and the rotation of `kernels.rope.Rope.rotate` in one kernel: plain keys
never reach memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessiond.kernels.rope import Rope
from sessiond.kernels.triton_parts import padded

BLOCK_KEYS = 64
BLOCK_RANK = 64


@triton.jit
def _plain(
    coordinates: tl.tensor,
    basis: tl.tensor,
    mean: tl.tensor,
    positions: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    rank: int,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """The keys [N, C] at `positions` [N], in `columns` [C] of the basis where `inside` [C]. Position -1: zeros."""
    there = (positions >= 0)[:, None]
    product = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for low in range(0, rank, BLOCK_R):
        axes = low + tl.arange(0, BLOCK_R)
        held = (axes < rank)[None, :]
        rows = tl.load(coordinates + positions[:, None] * rank + axes[None, :], there & held, other=0.0)
        vectors = tl.load(basis + columns[:, None] * rank + axes[None, :], inside[:, None] & held, other=0.0)
        product = tl.dot(rows, tl.trans(vectors), product, input_precision="ieee")
    middle = tl.load(mean + columns, inside, other=0.0)
    return tl.where(there, product + middle[None, :], 0.0)


@triton.jit
def _reconstruct(
    coordinates: tl.tensor,
    basis: tl.tensor,
    mean: tl.tensor,
    chosen: tl.tensor,
    inv_freq: tl.tensor,
    out: tl.tensor,
    n_chosen: int,
    rank: int,
    rope_scale: float,
    HEAD_DIM: tl.constexpr,
    N_HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Some keys of a group: two halves that rotate together, then the channels that do not."""
    group = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = places < n_chosen
    positions = tl.load(chosen + group * n_chosen + places, there, other=-1)
    out += (group * n_chosen + places)[:, None] * HEAD_DIM
    kind = out.dtype.element_ty

    halves = tl.arange(0, BLOCK_H)
    inside = halves < N_HALF
    columns = group * HEAD_DIM + halves
    first = _plain(coordinates, basis, mean, positions, columns, inside, rank, BLOCK_N, BLOCK_H, BLOCK_R)
    second = _plain(coordinates, basis, mean, positions, columns + N_HALF, inside, rank, BLOCK_N, BLOCK_H, BLOCK_R)
    angles = positions.to(tl.float32)[:, None] * tl.load(inv_freq + halves, inside, other=0.0)[None, :]
    cos, sin = tl.cos(angles) * rope_scale, tl.sin(angles) * rope_scale
    stored = there[:, None] & inside[None, :]
    tl.store(out + halves[None, :], (first * cos - second * sin).to(kind), mask=stored)
    tl.store(out + N_HALF + halves[None, :], (second * cos + first * sin).to(kind), mask=stored)
    if 2 * N_HALF < HEAD_DIM:
        rest = 2 * N_HALF + tl.arange(0, BLOCK_REST)
        inside = rest < HEAD_DIM
        columns = group * HEAD_DIM + rest
        plain = _plain(coordinates, basis, mean, positions, columns, inside, rank, BLOCK_N, BLOCK_REST, BLOCK_R)
        tl.store(out + rest[None, :], plain.to(kind), mask=there[:, None] & inside[None, :])


def reconstruct_keys(
    coordinates: Tensor, basis: Tensor, mean: Tensor, positions: Tensor, rope: Rope, dtype: torch.dtype
) -> Tensor:
    """Keys [G, K, D] in `dtype` at `positions` [G, K] int64: coordinates [n, R] in a basis [G D, R] about a mean [G D].

    Coordinates and basis both bf16 or both fp32, the mean fp32; positions below n, -1 gives zeros. The same as
    `rope.rotate(factors.take(positions), positions)`. Raises ValueError for shapes that do not fit.
    """
    n_groups, n_chosen = positions.shape
    head_dim, rank = basis.shape[0] // n_groups, basis.shape[1]
    n_half = rope.inv_freq.shape[0]
    if basis.shape[0] != n_groups * head_dim or mean.shape != basis.shape[:1] or 2 * n_half > head_dim:
        raise ValueError(f"basis {tuple(basis.shape)}, mean {tuple(mean.shape)} for {n_groups} groups, rope {n_half}")
    if coordinates.shape[1] != rank or coordinates.dtype != basis.dtype:
        raise ValueError(f"coordinates {tuple(coordinates.shape)} {coordinates.dtype} in a basis of rank {rank}")
    out = torch.empty(n_groups, n_chosen, head_dim, dtype=dtype, device=coordinates.device)
    if n_chosen:
        _reconstruct[(triton.cdiv(n_chosen, BLOCK_KEYS), n_groups)](
            coordinates.contiguous(),
            basis.contiguous(),
            mean.contiguous(),
            positions.contiguous(),
            rope.inv_freq.to(coordinates.device),
            out,
            n_chosen,
            rank,
            rope.scale,
            HEAD_DIM=head_dim,
            N_HALF=n_half,
            BLOCK_N=BLOCK_KEYS,
            BLOCK_H=padded(n_half),
            BLOCK_REST=padded(head_dim - 2 * n_half),
            BLOCK_R=min(BLOCK_RANK, padded(rank)),
        )
    return out
