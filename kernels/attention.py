"""Attention of few new tokens over one session's long history, grouped heads.

The reference is also what computes prefill cells: two matrix products per head group over all keys, on the CPU several
times faster than torch's SDPA for few queries (docs/decisions/0002-reserved-kv.md). The compiled twin reads keys and
values once and needs no memory for scores: flash-decoding (Dao et al. 2023) on AVX-512 BF16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sessiond.kernels.native_library import AVX512_BF16, lib

# Up to so many new tokens the compiled kernel is the faster one.
MOST_TOKENS = 64
# Up to so many scores all head groups are masked and normalized in one call; beyond, one group stays in cache better.
SMALL_SCORES = 1 << 18


class Scratch:
    """Reused memory for scores and states: fresh megabytes every layer would cost more page faults than arithmetic."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, n: int, dtype: torch.dtype) -> Tensor:
        """An uninitialized [n], valid until the same name is taken again."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < n or flat.dtype != dtype:
            flat = self._flat[name] = torch.empty(n, dtype=dtype)
        return flat[:n]


def attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first: int,
    open_end: int,
    mask: Tensor,
    scaling: float,
    scratch: Scratch,
) -> Tensor:
    """query [H, Q, D]; keys, values [G, T, D], of which [first, first + W) take part. Returns [Q, H, D].

    `mask` [Q, W - (open_end - first)]: keys from `open_end` on that a query must not see. Scores and weights are
    rounded to the model's dtype; softmax and sums run in fp32 inside torch.
    """
    n_heads, n_new, head_dim = query.shape
    n_groups = keys.shape[0]
    rows = n_heads // n_groups * n_new
    width = open_end - first + mask.shape[1]
    last = first + width
    grouped = (query * scaling).reshape(n_groups, rows, head_dim)
    out = torch.empty_like(grouped)
    at_once = n_groups if n_groups * rows * width <= SMALL_SCORES else 1
    for group in range(0, n_groups, at_once):
        together = range(group, group + at_once)
        scores = scratch.take("scores", at_once * rows * width, query.dtype).view(at_once * rows, width)
        for i, g in enumerate(together):
            torch.mm(grouped[g], keys[g, first:last].t(), out=scores[i * rows : (i + 1) * rows])
        scores.view(-1, n_new, width)[..., open_end - first :].masked_fill_(mask, float("-inf"))
        weights = scratch.take("weights", at_once * rows * width, query.dtype).view(at_once * rows, width)
        torch.softmax(scores, -1, out=weights)
        for i, g in enumerate(together):
            torch.mm(weights[i * rows : (i + 1) * rows], values[g, first:last], out=out[g])
    return out.view(n_heads, n_new, head_dim).transpose(0, 1)


def few_tokens_supported(query: Tensor) -> bool:
    """Whether `attend_few` computes this query [H, Q, D] on this machine."""
    return (
        AVX512_BF16
        and query.shape[1] <= MOST_TOKENS
        and query.dtype is torch.bfloat16
        and query.shape[2] % 32 == 0
        and query.shape[2] <= 256
        and query.device.type == "cpu"
    )


def attend_few(
    query: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None, scaling: float, scratch: Scratch
) -> Tensor:
    """query [H, Q, D] at [position, position + Q); keys, values [G, T, D], T a multiple of 16. Returns [Q, H, D].

    Each token sees the keys up to its own, with `window` only the last `window` of them. Weights are rounded to bf16,
    sums are fp32. The order of sums depends on the lengths only: not on threads, nor on other sessions.
    """
    n_heads, n_new, head_dim = query.shape
    n_groups = keys.shape[0]
    query = query.contiguous()
    out = query.new_empty(n_new, n_heads, head_dim)
    rows = n_heads // n_groups * n_new
    n = lib.attention_scratch(n_groups, rows, head_dim, position + n_new)
    lib.attention_bf16(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        scratch.take("states", n, torch.float32).data_ptr(),
        n_groups,
        keys.stride(0),
        n_heads // n_groups,
        n_new,
        head_dim,
        position,
        window or 0,
        scaling,
        torch.get_num_threads(),
    )
    return out
