"""Attention over keys and values in few bits on a GPU, as policies/quantized.py packs them: flash-decoding on codes.

Codes become numbers in registers, so what is read is the codes. KIVI (Liu et al. 2024, arXiv 2402.02750) computes its
keys' products like that; the grouping is of channels here, for keys and values alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessiond.kernels.triton_decode import attend_runs, n_splits
from sessiond.kernels.triton_parts import BLOCK_KEYS, BLOCK_ROWS, LOG2_E, SPLIT, Parts, absorb, leave, padded

Coded = tuple[Tensor, Tensor]  # codes [G, N, B] uint8, scales and lows [G, N, 2 P] bf16


@triton.jit
def _decoded(
    codes: tl.tensor,
    scales: tl.tensor,
    tokens: tl.tensor,
    there: tl.tensor,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """The rows [N, D] at `tokens` [N], where `there` [N], else 0: fp32. Byte j holds channels j, j + B, j + 2 B ..."""
    n_bytes: tl.constexpr = (HEAD_DIM * BITS + 7) // 8
    n_scales: tl.constexpr = (HEAD_DIM + GROUP - 1) // GROUP
    channels = tl.arange(0, BLOCK_D)
    inside = there[:, None] & (channels < HEAD_DIM)[None, :]
    packed = tl.load(codes + tokens[:, None] * n_bytes + (channels % n_bytes)[None, :], inside, other=0)
    code = (packed.to(tl.int32) >> (channels // n_bytes * BITS)[None, :]) & ((1 << BITS) - 1)
    of_group = scales + tokens[:, None] * (2 * n_scales) + (channels // GROUP)[None, :]
    scale = tl.load(of_group, inside, other=0.0).to(tl.float32)
    low = tl.load(of_group + n_scales, inside, other=0.0).to(tl.float32)
    return code.to(tl.float32) * scale + low


@triton.jit
def _attend_part(
    query: tl.tensor,
    key_codes: tl.tensor,
    key_scales: tl.tensor,
    value_codes: tl.tensor,
    value_scales: tl.tensor,
    chosen: tl.tensor,
    means: tl.tensor,
    logs: tl.tensor,
    strides: tl.tuple,
    n_tokens: int,
    n_rows: int,
    scale: float,
    n_parts: int,
    CHOSEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Some rows of a group over one part of the coded tokens, or of those chosen among them."""
    block, group, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    key_codes, key_scales = key_codes + group * strides[0], key_scales + group * strides[1]
    value_codes, value_scales = value_codes + group * strides[2], value_scales + group * strides[3]
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    inside = (rows < n_rows)[:, None] & (channels < HEAD_DIM)[None, :]
    at = group * n_rows + rows
    queries = tl.load(query + at[:, None] * HEAD_DIM + channels[None, :], inside, other=0.0)

    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start = part * SPLIT
    end = tl.minimum(start + SPLIT, n_tokens)
    for low in range(start, end, BLOCK_N):
        places = low + tl.arange(0, BLOCK_N)
        tokens = places.to(tl.int64)
        there = places < end
        if CHOSEN:
            tokens = tl.load(chosen + group * n_tokens + places, there, other=-1)
            there = tokens >= 0
        keys = _decoded(key_codes, key_scales, tokens, there, HEAD_DIM, GROUP, BITS, BLOCK_D).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        values = _decoded(value_codes, value_scales, tokens, there, HEAD_DIM, GROUP, BITS, BLOCK_D).to(queries.dtype)
        mean, total, largest = absorb(scores, values, mean, total, largest)
    leave(means, logs, at * n_parts + part, rows < n_rows, mean, total, largest, HEAD_DIM, BLOCK_D)


def attend_codes(
    query: Tensor,
    coded_keys: Coded,
    coded_values: Coded,
    bits: int,
    group: int,
    n: int,
    keys: Tensor,
    values: Tensor,
    own: slice,
    scaling: float,
    chosen: Tensor | None = None,
) -> Tensor:
    """query [H, Q, D] over the first `n` coded tokens and, exactly and causally, over `own` of keys, values [G, T, D].

    Codes and scales as in `policies.quantized.Codes(bits, group)`, N >= n; `group` 0: one for the whole row. `own` ends
    with the queries' own positions. With `chosen` [G, K] int64 only those of the coded tokens; its rows may end with
    -1. Returns [Q, H, D]. Raises ValueError for shapes that do not fit.
    """
    n_heads, n_new, head_dim = query.shape
    query = query.contiguous()
    group = group or head_dim
    count = n if chosen is None else chosen.shape[1]
    n_before = n_splits([count])
    parts = Parts(query[None], n_before + n_splits([own.stop - own.start]))
    attend_runs(parts, n_before, query[None], [keys], [values], [own.start], [own.stop - n_new], None, scaling)
    if n_before:
        n_groups = keys.shape[0]
        for codes, scales in (coded_keys, coded_values):
            check_codes(codes, scales, bits, group, n_groups, n, head_dim)
        if chosen is not None and (chosen.dtype is not torch.int64 or chosen.shape[0] != n_groups):
            raise ValueError(f"chosen {chosen.dtype} {tuple(chosen.shape)} for {n_groups} groups")
        n_rows = n_heads // n_groups * n_new
        block = min(BLOCK_ROWS, padded(n_rows))
        positions = query.new_empty(0, dtype=torch.int64) if chosen is None else chosen.contiguous()
        _attend_part[(triton.cdiv(n_rows, block), n_groups, n_before)](
            query,
            *coded_keys,
            *coded_values,
            positions,
            parts.means,
            parts.logs,
            tuple(part.stride(0) for part in (*coded_keys, *coded_values)),
            count,
            n_rows,
            scaling * LOG2_E,
            parts.n,
            CHOSEN=chosen is not None,
            HEAD_DIM=head_dim,
            GROUP=group,
            BITS=bits,
            SPLIT=SPLIT,
            BLOCK_M=block,
            BLOCK_N=BLOCK_KEYS,
            BLOCK_D=padded(head_dim),
        )
    return parts.join(query[None])[0]


def check_codes(codes: Tensor, scales: Tensor, bits: int, group: int, n_groups: int, n: int, width: int) -> None:
    """Raises ValueError unless these are `n` rows of `width` numbers or more, and rows lie one after another."""
    wanted = {"codes": (codes, -(-width * bits // 8)), "scales": (scales, 2 * -(-width // group))}
    for name, (part, columns) in wanted.items():
        if part.shape[0] != n_groups or part.shape[1] < n or part.shape[2] != columns:
            raise ValueError(f"{name} {tuple(part.shape)} for {n_groups} groups of {n} rows of {width} numbers")
        if part.stride(2) != 1 or part.stride(1) != columns:
            raise ValueError(f"{name} whose rows are not one after another: strides {part.stride()}")
    if bits not in (2, 4, 8) or codes.dtype is not torch.uint8 or scales.dtype is not torch.bfloat16:
        raise ValueError(f"codes of {bits} bits in {codes.dtype} with scales in {scales.dtype}")
