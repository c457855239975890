"""Attention of new tokens over sessions' histories, grouped heads.

The compiled kernel computes all spans of a step in one call, reads keys and values once and needs no memory for scores:
flash-decoding for few rows, flash attention for many (Dao et al. 2022, 2023). The reference is two matrix products per
head group over all keys, on the CPU several times faster than torch's SDPA for few queries
(docs/decisions/0002-reserved-kv.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sessiond.kernels.native_library import BUILT, ffi, lib

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


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpan:
    """New tokens of one session: `query` [H, Q, D] at [position, position + Q), with any strides of heads and tokens.

    `keys`, `values` [G, T, D], T a multiple of 16: positions up to the last query's, what lies behind is no NaN.
    `out` [Q, H, D] is written.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    position: int
    out: Tensor


def native_attention_supported(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether `attend_spans` computes such heads on this machine."""
    return BUILT and dtype is torch.bfloat16 and head_dim % 32 == 0 and head_dim <= 256 and device.type == "cpu"


def attend_spans(spans: Sequence[AttentionSpan], window: int | None, scaling: float, scratch: Scratch) -> None:
    """Attention of every span over its own session, all of one shape of heads, in one call of the kernel.

    Each token sees the keys up to its own, with `window` only the last `window` of them. Sums are fp32, weights are
    rounded to bf16 where AVX-512 computes. A span's result depends on itself alone: not on threads nor other spans.
    Raises ValueError for what the kernel does not take.
    """
    if window is not None and window < 0:
        raise ValueError(f"a window of {window} tokens")
    if not spans:
        return
    n_heads, _, head_dim = spans[0].query.shape
    n_groups = spans[0].keys.shape[0]
    if not native_attention_supported(spans[0].query.dtype, head_dim, spans[0].query.device) or n_heads % n_groups:
        raise ValueError(f"the kernel takes no {n_heads} heads of {head_dim} in {n_groups} groups here")
    for span in spans:
        _check(span, n_heads, n_groups, head_dim)
    shape = ffi.new("struct attention_shape *", (n_groups, n_heads // n_groups, head_dim, window or 0, scaling))
    records = ffi.new("struct attention_span[]", [_record(span) for span in spans])
    n_threads = torch.get_num_threads()
    n = lib.attention_spans_scratch(shape, records, len(spans), n_threads)
    states = scratch.take("states", n, torch.float32)
    lib.attention_spans(shape, records, len(spans), states.data_ptr(), n_threads)


def _check(span: AttentionSpan, n_heads: int, n_groups: int, head_dim: int) -> None:
    query, keys, values, out = span.query, span.keys, span.values, span.out
    n_new, capacity = query.shape[1], keys.shape[1]
    for part in (query, keys, values, out):
        if part.dtype is not torch.bfloat16 or not part.is_cpu:
            raise ValueError(f"the kernel takes bf16 on the CPU, not {part.dtype} on {part.device}")
    if query.shape != (n_heads, n_new, head_dim) or keys.shape != (n_groups, capacity, head_dim):
        raise ValueError(f"heads {tuple(query.shape)} do not fit keys {tuple(keys.shape)} or the other spans")
    if values.shape != keys.shape or values.stride() != keys.stride() or keys.stride()[1:] != (head_dim, 1):
        raise ValueError("keys and values must lie alike, each group in one run")
    if span.position < 0 or -(-(span.position + n_new) // 16) * 16 > capacity:
        raise ValueError(f"{n_new} positions from {span.position} on are not readable in whole tiles of {capacity}")
    if out.shape != (n_new, n_heads, head_dim) or out.stride()[1:] != (head_dim, 1) or query.stride(2) != 1:
        raise ValueError(f"no room for {tuple(query.shape)} in {tuple(out.shape)}, or channels are not contiguous")


def _record(span: AttentionSpan) -> tuple[int, ...]:
    """A struct attention_span."""
    return (
        span.query.data_ptr(),
        span.out.data_ptr(),
        span.keys.data_ptr(),
        span.values.data_ptr(),
        span.query.stride(1),
        span.query.stride(0),
        span.out.stride(0),
        span.keys.stride(0),
        span.query.shape[1],
        span.position,
    )


def attend_few(
    query: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None, scaling: float, scratch: Scratch
) -> Tensor:
    """`attend_spans` of one span [H, Q, D]. Returns [Q, H, D]."""
    n_heads, n_new, head_dim = query.shape
    out = query.new_empty(n_new, n_heads, head_dim)
    attend_spans([AttentionSpan(query, keys, values, position, out)], window, scaling, scratch)
    return out
