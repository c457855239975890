"""Attention of few new tokens over long histories on a GPU, grouped heads, ragged batch.

Flash-decoding (Dao et al. 2023): the keys of a session are divided among programs in parts of a fixed length; a second
kernel joins the parts. All heads of a group are rows of one tile, so keys and values are read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessiond.kernels.triton_parts import BLOCK_KEYS, BLOCK_ROWS, LOG2_E, SPLIT, Parts, absorb, leave, padded


@triton.jit
def _attend_part(
    query: tl.tensor,
    table: tl.tensor,
    means: tl.tensor,
    logs: tl.tensor,
    n_rows: int,
    n_new: int,
    window: int,
    scale: float,
    n_parts: int,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Some rows of a group, [share, Q] flat, over one part of their session's keys."""
    blocks = tl.cdiv(n_rows, BLOCK_M)
    session, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    group, part = tl.program_id(1), tl.program_id(2)
    element = tl.pointer_type(query.dtype.element_ty)
    entry = table + session * 6
    keys = tl.multiple_of(tl.load(entry), ALIGN).to(element) + group * tl.multiple_of(tl.load(entry + 2), ALIGN)
    values = tl.multiple_of(tl.load(entry + 1), ALIGN).to(element) + group * tl.multiple_of(tl.load(entry + 3), ALIGN)
    first, position = tl.load(entry + 4), tl.load(entry + 5)

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    inside = (channels < HEAD_DIM)[None, :]
    at = (session.to(tl.int64) * tl.num_programs(1) + group) * n_rows + rows
    queries = tl.load(query + at[:, None] * HEAD_DIM + channels[None, :], (rows < n_rows)[:, None] & inside, other=0.0)
    own = position + rows % n_new

    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start = first + part * SPLIT
    end = tl.minimum(start + SPLIT, position + n_new)
    for low in range(start, end, BLOCK_N):
        tokens = low + tl.arange(0, BLOCK_N)
        there = (tokens < end)[:, None] & inside
        offsets = tokens[:, None] * HEAD_DIM + channels[None, :]
        block_keys = tl.load(keys + offsets, there, other=0.0)
        scores = tl.dot(queries, tl.trans(block_keys), input_precision="ieee") * scale
        seen = (tokens < end)[None, :] & (tokens[None, :] <= own[:, None])
        if window > 0:
            seen = seen & (tokens[None, :] > own[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        block_values = tl.load(values + offsets, there, other=0.0)
        mean, total, largest = absorb(scores, block_values, mean, total, largest)
    leave(means, logs, at * n_parts + part, rows < n_rows, mean, total, largest, HEAD_DIM, BLOCK_D)


def attend_few(
    query: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None, scaling: float, scratch: object
) -> Tensor:
    """query [H, Q, D] at [position, position + Q); keys, values [G, T, D]. Returns [Q, H, D].

    The contract of `attention.attend_few`; `scratch` is for the CPU, torch keeps a device's memory itself.
    """
    return attend_few_batch(query[None], [keys], [values], [position], window, scaling)[0]


def attend_few_batch(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    positions: Sequence[int],
    window: int | None,
    scaling: float,
) -> Tensor:
    """query [B, H, Q, D], of session b at [positions[b], positions[b] + Q); its keys, values [G, T, D]: [B, Q, H, D].

    bf16, fp16 or fp32, sums in fp32. Each token sees the keys up to its own, with `window` only the last `window` of
    them. A session's result does not depend on the others of the batch. Raises ValueError for shapes that do not fit.
    """
    query = query.contiguous()
    first = [max(0, position - window + 1) if window else 0 for position in positions]
    n_tokens = [position + query.shape[2] - low for position, low in zip(positions, first, strict=True)]
    parts = Parts(query, n_splits(n_tokens))
    attend_runs(parts, 0, query, keys, values, first, positions, window, scaling)
    return parts.join(query)


def n_splits(n_tokens: Sequence[int]) -> int:
    """Into how many parts the longest of a batch divides."""
    return -(-max(n_tokens) // SPLIT)


def attend_runs(
    parts: Parts,
    n_before: int,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    first: Sequence[int],
    positions: Sequence[int],
    window: int | None,
    scaling: float,
) -> None:
    """Fill the parts from `n_before` on with attention over the keys from first[b] on; else as `attend_few_batch`."""
    n_sessions, n_heads, n_new, head_dim = query.shape
    rows = []
    for k, v, low, position in zip(keys, values, first, positions, strict=True):
        _check(query, k, v, position + n_new)
        rows.append([k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), low, position])
    if len(rows) != n_sessions:
        raise ValueError(f"{n_sessions} sessions in the query, keys of {len(rows)}")
    n_groups = keys[0].shape[0]
    n_rows = n_heads // n_groups * n_new
    block = min(BLOCK_ROWS, padded(n_rows))
    aligned = all(number % 16 == 0 for row in rows for number in row[:4])
    _attend_part[(n_sessions * triton.cdiv(n_rows, block), n_groups, parts.n - n_before)](
        query,
        torch.tensor(rows, dtype=torch.int64, device=query.device),
        parts.means[:, n_before:],
        parts.logs[:, n_before:],
        n_rows,
        n_new,
        window or 0,
        scaling * LOG2_E,
        parts.n,
        HEAD_DIM=head_dim,
        SPLIT=SPLIT,
        ALIGN=16 if aligned else 1,
        BLOCK_M=block,
        BLOCK_N=BLOCK_KEYS,
        BLOCK_D=padded(head_dim),
    )


def _check(query: Tensor, keys: Tensor, values: Tensor, n: int) -> None:
    """Raises ValueError where keys or values [G, T, D] do not hold `n` tokens for queries [B, H, Q, D]."""
    for cached in (keys, values):
        n_groups, room, head_dim = cached.shape
        if cached.dtype is not query.dtype or cached.device != query.device:
            raise ValueError(f"queries {query.dtype} on {query.device}, keys {cached.dtype} on {cached.device}")
        if n_groups != keys.shape[0] or query.shape[1] % n_groups or head_dim != query.shape[3] or room < n:
            raise ValueError(f"keys {tuple(cached.shape)} do not serve queries {tuple(query.shape)} up to {n}")
        if cached.stride(2) != 1 or cached.stride(1) != head_dim:
            raise ValueError(f"keys whose tokens are not one after another: strides {cached.stride()}")
