"""Scores of pages of keys by each channel's bounds on a GPU: Quest (Tang et al. 2024, arXiv 2406.10774)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessiond.kernels.triton_parts import padded

BLOCK_PAGES = 64
MOST_ROWS = 128


@triton.jit
def _score(
    query: tl.tensor,
    rising: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    out: tl.tensor,
    low_stride: int,
    high_stride: int,
    rising_group: int,
    rising_row: int,
    n_rows: int,
    n_pages: int,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """All queries of a group with some pages."""
    group = tl.program_id(1).to(tl.int64)
    rows, channels = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    pages = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (channels < HEAD_DIM)[None, :]
    there = (rows < n_rows)[:, None] & inside
    queries = tl.load(query + (group * n_rows + rows)[:, None] * HEAD_DIM + channels[None, :], there, other=0.0)
    rises = tl.load(rising + group * rising_group + rows[:, None] * rising_row + channels[None, :], there, other=0) != 0
    held = (pages < n_pages)[:, None] & inside
    offsets = pages[:, None] * HEAD_DIM + channels[None, :]
    highest = tl.load(high + group * high_stride + offsets, held, other=0.0).to(queries.dtype)
    lowest = tl.load(low + group * low_stride + offsets, held, other=0.0).to(queries.dtype)
    none = tl.zeros_like(queries)
    scores = tl.dot(tl.where(rises, queries, none), tl.trans(highest), input_precision="ieee")
    scores = tl.dot(tl.where(rises, none, queries), tl.trans(lowest), scores, input_precision="ieee")
    at = (group * n_rows + rows)[:, None] * n_pages + pages[None, :]
    tl.store(out + at, scores, mask=(rows < n_rows)[:, None] & (pages < n_pages)[None, :])


def page_scores(low: Tensor, high: Tensor, query: Tensor, rising: Tensor) -> Tensor:
    """Products of queries [G, R, D] with a page's largest values in `rising` channels, its smallest in the others.

    low, high [G, P, D], `rising` [G, R or 1, D] bool; the result [G, R, P], fp32, as `policies.pages.Pages.scores`.
    Raises ValueError for shapes that do not fit.
    """
    n_groups, n_rows, head_dim = query.shape
    n_pages = low.shape[1]
    if low.shape != (n_groups, n_pages, head_dim) or high.shape != low.shape or n_rows > MOST_ROWS:
        raise ValueError(f"pages {tuple(low.shape)}, {tuple(high.shape)} for queries {tuple(query.shape)}")
    if low.dtype != high.dtype or any(bounds.stride()[1:] != (head_dim, 1) for bounds in (low, high)):
        raise ValueError(f"bounds of pages that are not one after another: strides {low.stride()}, {high.stride()}")
    # Tiles of 16 bits multiply exactly and sum in fp32; of two kinds they do not multiply.
    query = (query if query.dtype == low.dtype else query.float()).contiguous()
    marks = rising.expand(n_groups, -1, head_dim).contiguous().view(torch.uint8)
    out = query.new_empty(n_groups, n_rows, n_pages, dtype=torch.float32)
    _score[(triton.cdiv(n_pages, BLOCK_PAGES), n_groups)](
        query,
        marks,
        low,
        high,
        out,
        low.stride(0),
        high.stride(0),
        marks.stride(0),
        head_dim if marks.shape[1] > 1 else 0,
        n_rows,
        n_pages,
        HEAD_DIM=head_dim,
        BLOCK_M=padded(n_rows),
        BLOCK_N=BLOCK_PAGES,
        BLOCK_D=padded(head_dim),
    )
    return out
