"""Rows of numbers to codes of few bits on a GPU, the same to the bit as `policies.quantized.Codes.extend`.

One kernel finds the bounds of each group of numbers, the next makes and packs the codes: a byte holds numbers of
several groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessiond.kernels.triton_parts import padded

BLOCK_ROWS = 64


@triton.jit
def _to_bfloat16(number: tl.tensor) -> tl.tensor:
    """The nearest bf16, ties to even. In the bits, because Triton's interpreter cuts where GPUs round."""
    bits = number.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _bounds(
    rows: tl.tensor,
    scales: tl.tensor,
    rows_stride: int,
    scales_stride: int,
    n_rows: int,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """Scale and low of one group of numbers in some rows."""
    n_scales: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    part, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = part * GROUP + tl.arange(0, BLOCK_G)
    inside = (at < n_rows)[:, None] & ((tl.arange(0, BLOCK_G) < GROUP) & (channels < WIDTH))[None, :]
    numbers = rows + head * rows_stride + at[:, None] * WIDTH + channels[None, :]
    low = tl.min(tl.load(numbers, inside, other=float("inf")).to(tl.float32), 1)
    high = tl.max(tl.load(numbers, inside, other=float("-inf")).to(tl.float32), 1)
    # Rows that do not exist have bounds of no meaning.
    low, high = tl.where(at < n_rows, low, 0.0), tl.where(at < n_rows, high, 0.0)
    scale = tl.maximum(tl.div_rn(high - low, LEVELS * 1.0), 1e-8)
    to = scales + head * scales_stride + at * (2 * n_scales) + part
    tl.store(to, _to_bfloat16(scale), mask=at < n_rows)
    tl.store(to + n_scales, _to_bfloat16(low), mask=at < n_rows)


@triton.jit
def _pack(
    rows: tl.tensor,
    scales: tl.tensor,
    codes: tl.tensor,
    rows_stride: int,
    scales_stride: int,
    codes_stride: int,
    n_rows: int,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """The bytes of some rows. Byte j holds the codes of numbers j, j + B, j + 2 B ..., the first in its lowest bits."""
    n_bytes: tl.constexpr = (WIDTH * BITS + 7) // 8
    n_scales: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    head = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_B)
    inside = (at < n_rows)[:, None] & (columns < n_bytes)[None, :]
    packed = tl.zeros([BLOCK_N, BLOCK_B], tl.int32)
    for part in tl.static_range(8 // BITS):
        channels = part * n_bytes + columns
        there = inside & (channels < WIDTH)[None, :]
        numbers = rows + head * rows_stride + at[:, None] * WIDTH + channels[None, :]
        of_group = scales + head * scales_stride + at[:, None] * (2 * n_scales) + (channels // GROUP)[None, :]
        scale = tl.load(of_group, there, other=1.0).to(tl.float32)
        low = tl.load(of_group + n_scales, there, other=0.0).to(tl.float32)
        number = tl.load(numbers, there, other=0.0).to(tl.float32)
        level = tl.div_rn(number - low, scale)
        level = tl.minimum(tl.maximum(level, 0.0), (1 << BITS) - 1.0)
        # Adding 1.5 * 2^23 leaves no bits for fractions: rounds to the nearest, ties to even, as torch.round.
        level = (level + 12582912.0) - 12582912.0
        packed = packed | (level.to(tl.int32) << (part * BITS))
    to = codes + head * codes_stride + at[:, None] * n_bytes + columns[None, :]
    tl.store(to, packed.to(tl.uint8), mask=inside)


def encode_rows(rows: Tensor, bits: int, group: int, codes: Tensor, scales: Tensor) -> None:
    """Write the codes of rows [G, N, D] to codes [G, N, B] uint8, their scales and lows to scales [G, N, 2 P] bf16.

    `group`: numbers of a row that share scale and low, P groups in a row; 0: the whole row. Raises ValueError for
    shapes that do not fit.
    """
    n_heads, n_rows, width = rows.shape
    group = group or width
    n_bytes, n_scales = -(-width * bits // 8), -(-width // group)
    if bits not in (2, 4, 8) or codes.dtype is not torch.uint8 or scales.dtype is not torch.bfloat16:
        raise ValueError(f"codes of {bits} bits in {codes.dtype} with scales in {scales.dtype}")
    if codes.shape != (n_heads, n_rows, n_bytes) or scales.shape != (n_heads, n_rows, 2 * n_scales):
        raise ValueError(f"codes {tuple(codes.shape)}, scales {tuple(scales.shape)} for rows {tuple(rows.shape)}")
    if any(part.stride()[1:] != (part.shape[2], 1) for part in (rows, codes, scales)):
        raise ValueError("rows, codes or scales whose rows are not one after another")
    if not n_rows:
        return
    blocks = triton.cdiv(n_rows, BLOCK_ROWS)
    _bounds[(blocks, n_scales, n_heads)](
        rows,
        scales,
        rows.stride(0),
        scales.stride(0),
        n_rows,
        WIDTH=width,
        GROUP=group,
        LEVELS=2**bits - 1,
        BLOCK_N=BLOCK_ROWS,
        BLOCK_G=padded(group),
    )
    _pack[(blocks, n_heads)](
        rows,
        scales,
        codes,
        rows.stride(0),
        scales.stride(0),
        codes.stride(0),
        n_rows,
        WIDTH=width,
        GROUP=group,
        BITS=bits,
        BLOCK_N=BLOCK_ROWS,
        BLOCK_B=padded(n_bytes),
    )
