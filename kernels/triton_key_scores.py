"""Scores of keys in 2, 4 or 8 bits on a GPU: what ranks tokens, and is read instead of the keys themselves.

A key is codes, one scale and one low (policies/quantized.py), so a product is that of the codes, scaled, and the
query's sum times the low; the codes need not become keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessiond.kernels.triton_codes import check_codes
from sessiond.kernels.triton_parts import padded

BLOCK_KEYS = 128
MOST_ROWS = 128


@triton.jit
def _score(
    query: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    codes_stride: int,
    scales_stride: int,
    n_rows: int,
    n_keys: int,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """All queries of a group with some keys. A byte is read once and multiplied for each of its codes."""
    n_bytes: tl.constexpr = (HEAD_DIM * BITS + 7) // 8
    group = tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_B)
    keys = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = (keys < n_keys)[:, None] & (columns < n_bytes)[None, :]
    packed = tl.load(codes + group * codes_stride + keys[:, None] * n_bytes + columns[None, :], held, other=0)
    at = (group * n_rows + rows)[:, None]
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    query_sum = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(8 // BITS):
        channels = part * n_bytes + columns
        there = (rows < n_rows)[:, None] & ((columns < n_bytes) & (channels < HEAD_DIM))[None, :]
        queries = tl.load(query + at * HEAD_DIM + channels[None, :], there, other=0.0)
        code = ((packed >> (part * BITS)) & ((1 << BITS) - 1)).to(queries.dtype)
        products = tl.dot(queries, tl.trans(code), products, input_precision="ieee")
        query_sum += tl.sum(queries.to(tl.float32), 1)
    of_key = scales + group * scales_stride + keys * 2
    scale = tl.load(of_key, keys < n_keys, other=0.0).to(tl.float32)
    low = tl.load(of_key + 1, keys < n_keys, other=0.0).to(tl.float32)
    scores = products * scale[None, :] + query_sum[:, None] * low[None, :]
    tl.store(out + at * n_keys + keys[None, :], scores, mask=(rows < n_rows)[:, None] & (keys < n_keys)[None, :])


def coded_key_scores(codes: Tensor, scales: Tensor, bits: int, query: Tensor, n: int) -> Tensor:
    """query [G, R, D] against the first `n` keys: [G, R, n], fp32, of codes that lie row by row as
    `policies.quantized.Codes` holds them.

    codes [G, N, B] uint8, scales [G, N, 2] bf16. Queries in fp16 multiply as fp32. Raises ValueError for shapes that
    do not fit.
    """
    n_groups, n_rows, head_dim = query.shape
    check_codes(codes, scales, bits, head_dim, n_groups, n, head_dim)
    if n_rows > MOST_ROWS:
        raise ValueError(f"{n_rows} queries at once, at most {MOST_ROWS}")
    # Codes are exact in bf16, and so are their products with queries in fp32.
    query = (query if query.dtype is torch.bfloat16 else query.float()).contiguous()
    out = query.new_empty(n_groups, n_rows, n, dtype=torch.float32)
    if n:
        _score[(triton.cdiv(n, BLOCK_KEYS), n_groups)](
            query,
            codes,
            scales,
            out,
            codes.stride(0),
            scales.stride(0),
            n_rows,
            n,
            HEAD_DIM=head_dim,
            BITS=bits,
            BLOCK_M=padded(n_rows),
            BLOCK_N=BLOCK_KEYS,
            BLOCK_B=padded(codes.shape[2]),
        )
    return out
