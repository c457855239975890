"""The attention function registered with transformers: each span of a packed step over its own session's memory.

Grouped-query attention as two matrix products per KV head group over all keys. On the CPU this is several times faster
than torch's SDPA for few queries and long histories (docs/decisions/0002-reserved-kv.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sessiond.cache import KEY_GRANULE, PackedSpan

NAME = "sessiond"
# Up to so many scores all head groups are masked and normalized in one call; beyond, one group stays in cache better.
SMALL_SCORES = 1 << 18


@dataclass(slots=True)
class PackedStep:
    """What the model's forward passes on to every layer: the spans of one step and memory to work in."""

    spans: list[PackedSpan]
    scratch: Scratch


class Scratch:
    """Reused memory for scores and weights: fresh megabytes every layer would cost more page faults than arithmetic."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int, like: Tensor) -> Tensor:
        """An uninitialized [rows, width] of `like`'s dtype, valid until the same name is taken again."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < rows * width or flat.dtype != like.dtype:
            flat = self._flat[name] = like.new_empty(rows * width)
        return flat[: rows * width].view(rows, width)


def attend(query: Tensor, span: PackedSpan, layer: int, scaling: float, window: int | None, scratch: Scratch) -> Tensor:
    """Causal attention of a span's new tokens over its session's keys and values, theirs included (already written).

    query [H, Q, D] stand at [position, position + Q); `window` limits each to its last `window` keys.
    Returns [Q, H, D]. Scores are rounded to the model's dtype; softmax and sums run in fp32 inside torch.
    """
    n_heads, n_new, head_dim = query.shape
    keys, values = span.cache.keys[layer], span.cache.values[layer]
    n_groups = keys.shape[0]
    # keys in [first, last) take part; those in [open_end, last) differ by query and are masked
    first = max(0, span.position - window + 1) // KEY_GRANULE * KEY_GRANULE if window else 0
    last = -(-(span.position + n_new) // KEY_GRANULE) * KEY_GRANULE
    open_end = first if window else min(span.position + 1, last)
    mask = span.mask(open_end, last - open_end, window)
    rows = n_heads // n_groups * n_new

    grouped = (query * scaling).reshape(n_groups, rows, head_dim)
    out = torch.empty_like(grouped)
    width = last - first
    at_once = n_groups if n_groups * rows * width <= SMALL_SCORES else 1
    for group in range(0, n_groups, at_once):
        together = range(group, group + at_once)
        scores = scratch.take("scores", at_once * rows, width, query)
        for i, g in enumerate(together):
            torch.mm(grouped[g], keys[g, first:last].t(), out=scores[i * rows : (i + 1) * rows])
        scores.view(-1, n_new, width)[..., open_end - first :].masked_fill_(mask, float("-inf"))
        weights = scratch.take("weights", at_once * rows, width, query)
        torch.softmax(scores, -1, out=weights)
        for i, g in enumerate(together):
            torch.mm(weights[i * rows : (i + 1) * rows], values[g, first:last], out=out[g])
    return out.view(n_heads, n_new, head_dim).transpose(0, 1)


def sessiond_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: PackedStep,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call. query [1, H, N, D]; returns [1, N, H, D]. Rows outside every span are zero."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    heads, spans, scratch = query[0], packed.spans, packed.scratch
    if len(spans) == 1 and heads.shape[1] == spans[0].end - spans[0].start:
        return attend(heads, spans[0], layer, scaling, sliding_window, scratch)[None], None
    out = heads.new_zeros(heads.shape[1], heads.shape[0], heads.shape[2])
    for span in spans:
        rows = slice(span.start, span.end)
        out[rows] = attend(heads[:, rows], span, layer, scaling, sliding_window, scratch)
    return out[None], None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The attention function masks by position itself; without this transformers builds a full mask every step."""


def register() -> None:
    """Make `NAME` an attention implementation of transformers. Idempotent."""
    AttentionInterface.register(NAME, sessiond_attention)
    AttentionMaskInterface.register(NAME, no_mask)
