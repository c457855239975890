"""Attention of a prefill cell on a GPU: FlashAttention-2 (Dao 2023, arXiv 2307.08691), causal and sliding window.

A program takes a tile of one head's queries over all keys they may see. Only the tiles that the causal edge or the
window's edge cuts are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sessiond.kernels.triton_parts import LOG2_E, absorb, padded

BLOCK_QUERIES = 64
BLOCK_KEYS = 64


@triton.jit
def _absorb_range(
    start: tl.tensor,
    end: tl.tensor,
    queries: tl.tensor,
    own: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    n_keys: tl.tensor,
    window: int,
    scale: float,
    mean: tl.tensor,
    total: tl.tensor,
    largest: tl.tensor,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take the keys at [start, end), whole tiles, into the sums of queries at positions `own` [M]."""
    channels = tl.arange(0, BLOCK_D)
    inside = (channels < HEAD_DIM)[None, :]
    for low in range(start, end, BLOCK_N):
        tokens = low + tl.arange(0, BLOCK_N)
        there = inside
        if MASKED:
            there = (tokens < n_keys)[:, None] & inside
        offsets = tokens[:, None] * HEAD_DIM + channels[None, :]
        block_keys = tl.load(keys + offsets, there, other=0.0)
        scores = tl.dot(queries, tl.trans(block_keys), input_precision="ieee") * scale
        if MASKED:
            seen = tokens[None, :] <= own[:, None]
            if window > 0:
                seen = seen & (tokens[None, :] > own[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        block_values = tl.load(values + offsets, there, other=0.0)
        mean, total, largest = absorb(scores, block_values, mean, total, largest)
    return mean, total, largest


@triton.jit
def _attend_tile(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    key_stride: int,
    value_stride: int,
    share: int,
    n_new: int,
    position: int,
    window: int,
    scale: float,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Some queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    keys, values = keys + head // share * key_stride, values + head // share * value_stride
    begin = tl.program_id(0) * BLOCK_M
    rows, channels = begin + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    there = (rows < n_new)[:, None] & (channels < HEAD_DIM)[None, :]
    queries = tl.load(query + (head * n_new + rows)[:, None] * HEAD_DIM + channels[None, :], there, other=0.0)
    own = position + rows
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)

    # [start, all_seen)    the window's edge cuts these tiles
    # [all_seen, edge)     every query of the tile sees them whole
    # [edge, end)          the causal edge cuts these
    oldest, newest = position + begin, position + tl.minimum(begin + BLOCK_M, n_new)
    start, all_seen = 0, 0
    if window > 0:
        start = tl.maximum(oldest - window + 1, 0) // BLOCK_N * BLOCK_N
        all_seen = tl.cdiv(tl.maximum(newest - window, 0), BLOCK_N) * BLOCK_N
    edge = tl.maximum((oldest + 1) // BLOCK_N * BLOCK_N, start)
    all_seen = tl.minimum(all_seen, edge)
    for zone in tl.static_range(3):
        low = start if zone == 0 else (all_seen if zone == 1 else edge)
        high = all_seen if zone == 0 else (edge if zone == 1 else newest)
        mean, total, largest = _absorb_range(
            low, high, queries, own, keys, values, newest, window, scale, mean, total, largest,
            zone != 1, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    at = (rows.to(tl.int64) * tl.num_programs(1) + head)[:, None] * HEAD_DIM + channels[None, :]
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=there)


def attend_prefill(
    query: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None, scaling: float
) -> Tensor:
    """query [H, Q, D] at [position, position + Q); keys, values [G, T, D]. Returns [Q, H, D].

    What `attention.attend_reference` computes over the keys up to each token's own, with `window` the last `window` of
    them. bf16, fp16 or fp32, sums in fp32. Raises ValueError for shapes that do not fit.
    """
    n_heads, n_new, head_dim = query.shape
    n_groups = keys.shape[0]
    if keys.shape != values.shape or keys.shape[2] != head_dim or n_heads % n_groups:
        raise ValueError(f"keys {tuple(keys.shape)}, values {tuple(values.shape)} for queries {tuple(query.shape)}")
    if keys.shape[1] < position + n_new or keys.dtype != query.dtype or values.dtype != query.dtype:
        raise ValueError(f"{keys.shape[1]} keys {keys.dtype} for queries {query.dtype} up to {position + n_new}")
    if any(cached.stride()[1:] != (head_dim, 1) for cached in (keys, values)):
        raise ValueError(f"keys whose tokens are not one after another: strides {keys.stride()}, {values.stride()}")
    query = query.contiguous()
    out = query.new_empty(n_new, n_heads, head_dim)
    _attend_tile[(triton.cdiv(n_new, BLOCK_QUERIES), n_heads)](
        query,
        keys,
        values,
        out,
        keys.stride(0),
        values.stride(0),
        n_heads // n_groups,
        n_new,
        position,
        window or 0,
        scaling * LOG2_E,
        HEAD_DIM=head_dim,
        BLOCK_M=min(BLOCK_QUERIES, padded(n_new)),
        BLOCK_N=BLOCK_KEYS,
        BLOCK_D=padded(head_dim),
    )
    return out
