"""Attention over chosen tokens and the turn's own run on a GPU, gathered without a copy.

Flash-decoding (Dao et al. 2023) again: the chosen tokens are divided into parts like a run of keys, and every query
sees all of them. The turn's own run, causal, is further parts of the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessiond.kernels.triton_decode import attend_runs, n_splits
from sessiond.kernels.triton_parts import BLOCK_KEYS, BLOCK_ROWS, LOG2_E, SPLIT, Parts, absorb, leave, padded

Forms = tuple[Tensor | None, Tensor | None]


@triton.jit
def _rows_of(source: tl.tensor, form: tl.tensor, offsets: tl.tensor, in_form: tl.tensor, there: tl.tensor) -> tl.tensor:
    """Rows of keys or values, from `form` instead where that is no null pointer."""
    places = tl.where(form.to(tl.int64) != 0, form + in_form, source + offsets)
    return tl.load(places, there, other=0.0)


@triton.jit
def _attend_part(
    query: tl.tensor,
    table: tl.tensor,
    means: tl.tensor,
    logs: tl.tensor,
    n_rows: int,
    scale: float,
    n_parts: int,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Some rows of a group over one part of the positions chosen for it."""
    blocks = tl.cdiv(n_rows, BLOCK_M)
    session, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    group, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    element = tl.pointer_type(query.dtype.element_ty)
    entry = table + session * 8
    n_chosen = tl.load(entry + 5)
    keys = tl.load(entry).to(element) + group * tl.load(entry + 2)
    values = tl.load(entry + 1).to(element) + group * tl.load(entry + 3)
    chosen = tl.load(entry + 4).to(tl.pointer_type(tl.int64)) + group * n_chosen
    key_form, value_form = tl.load(entry + 6).to(element), tl.load(entry + 7).to(element)

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    inside = (channels < HEAD_DIM)[None, :]
    at = (session.to(tl.int64) * tl.num_programs(1) + group) * n_rows + rows
    queries = tl.load(query + at[:, None] * HEAD_DIM + channels[None, :], (rows < n_rows)[:, None] & inside, other=0.0)

    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start = part * SPLIT
    end = tl.minimum(start + SPLIT, n_chosen)
    for low in range(start, end, BLOCK_N):
        places = low + tl.arange(0, BLOCK_N)
        tokens = tl.load(chosen + places, places < end, other=-1)
        there = (tokens >= 0)[:, None] & inside
        offsets = tokens[:, None] * HEAD_DIM + channels[None, :]
        in_form = (group * n_chosen + places)[:, None] * HEAD_DIM + channels[None, :]
        block_keys = _rows_of(keys, key_form, offsets, in_form, there)
        scores = tl.dot(queries, tl.trans(block_keys), input_precision="ieee") * scale
        scores = tl.where((tokens >= 0)[None, :], scores, float("-inf"))
        block_values = _rows_of(values, value_form, offsets, in_form, there)
        mean, total, largest = absorb(scores, block_values, mean, total, largest)
    leave(means, logs, at * n_parts + part, rows < n_rows, mean, total, largest, HEAD_DIM, BLOCK_D)


def attend_chosen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chosen: Tensor,
    own: slice,
    scaling: float,
    scratch: object,
    forms: Forms = (None, None),
) -> Tensor:
    """query [H, Q, D] over the positions `chosen` [G, K] of keys, values [G, T, D], and over `own`: [Q, H, D].

    What `chosen.attend_chosen` does for one span; `scratch` is for the CPU, torch keeps a device's memory itself.
    """
    return attend_chosen_batch(query[None], [keys], [values], [chosen], [own], scaling, [forms])[0]


def attend_chosen_batch(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    chosen: Sequence[Tensor],
    own: Sequence[slice],
    scaling: float,
    forms: Sequence[Forms] | None = None,
) -> Tensor:
    """query [B, H, Q, D]; of session b keys, values [G, T, D], chosen [G, K] int64, and its own run: [B, Q, H, D].

    Rows of `chosen` may end with -1: no position; a session may have K = 0. `own` ends with the queries' own
    positions. `forms` [G, K, D] stand in for keys and for values at the chosen positions. Raises ValueError for shapes
    that do not fit.
    """
    query = query.contiguous()
    n_new = query.shape[2]
    n_before = n_splits([positions.shape[1] for positions in chosen])
    n_own = n_splits([run.stop - run.start for run in own])
    parts = Parts(query, n_before + n_own)
    first, positions = [run.start for run in own], [run.stop - n_new for run in own]
    attend_runs(parts, n_before, query, keys, values, first, positions, None, scaling)
    if n_before:
        _attend(parts, n_before, query, keys, values, chosen, forms or [(None, None)] * len(chosen), scaling)
    return parts.join(query)


def _attend(
    parts: Parts,
    n: int,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    chosen: Sequence[Tensor],
    forms: Sequence[Forms],
    scaling: float,
) -> None:
    """Fill the first `n` parts. Keys and values were checked."""
    n_sessions, n_heads, n_new, head_dim = query.shape
    n_groups = keys[0].shape[0]
    rows, held = [], []
    for k, v, positions, instead in zip(keys, values, chosen, forms, strict=True):
        if positions.dtype is not torch.int64 or positions.shape[0] != n_groups:
            raise ValueError(f"chosen {positions.dtype} {tuple(positions.shape)} for {n_groups} groups")
        positions = positions.contiguous()
        row = [k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), positions.data_ptr(), positions.shape[1]]
        for form in instead:
            if form is not None:
                if form.shape != (*positions.shape, head_dim):
                    raise ValueError(f"a form {tuple(form.shape)} of {tuple(positions.shape)} positions")
                form = form.to(query.dtype).contiguous()
            row.append(form.data_ptr() if form is not None else 0)
            held.append(form)
        rows.append(row)
        held.append(positions)  # copies live until the kernel is queued
    n_rows = n_heads // n_groups * n_new
    block = min(BLOCK_ROWS, padded(n_rows))
    _attend_part[(n_sessions * triton.cdiv(n_rows, block), n_groups, n)](
        query,
        torch.tensor(rows, dtype=torch.int64, device=query.device),
        parts.means,
        parts.logs,
        n_rows,
        scaling * LOG2_E,
        parts.n,
        HEAD_DIM=head_dim,
        SPLIT=SPLIT,
        BLOCK_M=block,
        BLOCK_N=BLOCK_KEYS,
        BLOCK_D=padded(head_dim),
    )
