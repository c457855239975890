"""The attention function registered with transformers: each span of a packed step over its own session's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sessiond.cache import KEY_GRANULE, PackedSpan
from sessiond.kernels.attention import (
    AttentionSpan,
    Scratch,
    attend_reference,
    attend_spans,
    native_attention_supported,
)
from sessiond.kernels.chosen import ChosenSpan, attend_chosen
from sessiond.kernels.rope import Rope

NAME = "sessiond"


@dataclass(slots=True)
class PackedStep:
    """What the model's forward passes on to every layer: the spans of one step and memory to work in."""

    spans: list[PackedSpan]
    scratch: Scratch
    rope: Rope | None = None  # of the layers that see all of history


def attend(
    heads: Tensor, packed: PackedStep, layer: int, scaling: float, window: int | None, out: Tensor | None = None
) -> Tensor:
    """Causal attention of each span's new tokens over its session's keys and values, theirs included (already written).

    heads [H, N, D], of which a span's rows stand at [position, position + Q); `window` limits each to its last `window`
    keys. Returns [N, H, D], `out` if it is given; rows outside every span are zero.

    Spans that see everything are one call of a kernel, those whose policy chooses another: to wake the threads costs as
    much as one of them.
    """
    n_heads, n_rows, head_dim = heads.shape
    if out is None:
        covered = sum(span.end - span.start for span in packed.spans) == n_rows
        out = (heads.new_empty if covered else heads.new_zeros)(n_rows, n_heads, head_dim)
    native = native_attention_supported(heads.dtype, head_dim, heads.device)
    whole: list[AttentionSpan] = []
    sparse: list[ChosenSpan] = []
    into_sparse: list[Tensor] = []
    for span in packed.spans:
        query, into = heads[:, span.start : span.end], out[span.start : span.end]
        chosen = _choose(query, span, packed, layer, scaling) if window is None else None
        if chosen is not None:
            sparse.append(chosen)
            into_sparse.append(into)
        elif native:
            keys, values = span.cache.keys[layer], span.cache.values[layer]
            whole.append(AttentionSpan(query, keys, values, span.position, into))
        else:
            into[:] = _attend_all(query, span, packed.scratch, layer, scaling, window)
    attend_spans(whole, window, scaling, packed.scratch)
    attend_chosen(sparse, into_sparse, scaling, packed.scratch)
    return out


def _choose(query: Tensor, span: PackedSpan, packed: PackedStep, layer: int, scaling: float) -> ChosenSpan | None:
    """What of its session's memory a span's new tokens attend to, if its policy chooses; None: all.

    A span's `capture` is shown them first. A sliding layer never comes here: it sees little as it is.
    """
    keys, values, end = span.cache.keys[layer], span.cache.values[layer], span.position + query.shape[1]
    if span.capture is not None:
        span.capture(layer, query, keys[:, :end], scaling)
    if span.selection is None:
        return None
    chosen = span.selection.choose(
        layer, query, keys, values, span.position, scaling, packed.rope, decoding=span.decoding
    )
    if chosen is None:
        return None
    own = slice(span.selection.turn_start, end)
    return ChosenSpan(query, keys, values, chosen.positions, own, (chosen.keys, chosen.values), chosen.whole)


def _attend_all(
    query: Tensor, span: PackedSpan, scratch: Scratch, layer: int, scaling: float, window: int | None
) -> Tensor:
    """By the reference: keys in [first, last) take part; those in [open_end, last) differ by query and are masked."""
    first = max(0, span.position - window + 1) // KEY_GRANULE * KEY_GRANULE if window else 0
    last = -(-(span.position + query.shape[1]) // KEY_GRANULE) * KEY_GRANULE
    open_end = first if window else min(span.position + 1, last)
    mask = span.mask(open_end, last - open_end, window)
    keys, values = span.cache.keys[layer], span.cache.values[layer]
    return attend_reference(query, keys, values, first, open_end, mask, scaling, scratch)


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
    out = attend(query[0], packed, layer, scaling, sliding_window)
    for span in packed.spans:
        span.cache.release(layer)
    return out[None], None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The attention function masks by position itself; without this transformers builds a full mask every step."""


def register() -> None:
    """Make `NAME` an attention implementation of transformers. Idempotent."""
    AttentionInterface.register(NAME, sessiond_attention)
    AttentionMaskInterface.register(NAME, no_mask)
