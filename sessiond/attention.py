"""The attention function registered with transformers: each span of a packed step over its own session's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sessiond.cache import KEY_GRANULE, PackedSpan
from sessiond.kernels.attention import Scratch, attend_few, attend_reference, few_tokens_supported
from sessiond.kernels.chosen import ChosenSpan, attend_chosen
from sessiond.kernels.rope import Rope

NAME = "sessiond"


class InterruptedStepError(Exception):
    """A step that may wait was abandoned between two layers. Its KV is written in some layers and not in others."""


@dataclass(slots=True)
class PackedStep:
    """What the model's forward passes on to every layer: the spans of one step and memory to work in."""

    spans: list[PackedSpan]
    scratch: Scratch
    rope: Rope | None = None  # of the layers that see all of history
    gives_way: Callable[[], bool] | None = None  # asked in every layer whether the step is to be abandoned


def choose(
    query: Tensor, span: PackedSpan, layer: int, scaling: float, window: int | None, rope: Rope | None = None
) -> ChosenSpan | None:
    """What of its session's memory a span's new tokens attend to, if its policy chooses; None: all, or the window.

    A span's `capture` is shown them first.
    """
    if window is not None:  # a sliding layer sees little as it is
        return None
    keys, values = span.cache.keys[layer], span.cache.values[layer]
    if span.capture is not None:
        span.capture(layer, query, keys[:, : span.position + query.shape[1]], scaling)
    if span.selection is None:
        return None
    chosen = span.selection.choose(layer, query, keys, values, span.position, scaling, rope, decoding=span.decoding)
    if chosen is None:
        return None
    own = slice(span.selection.turn_start, span.position + query.shape[1])
    return ChosenSpan(query, keys, values, chosen.positions, own, (chosen.keys, chosen.values), chosen.whole)


def attend(
    query: Tensor,
    span: PackedSpan,
    layer: int,
    scaling: float,
    window: int | None,
    scratch: Scratch,
    rope: Rope | None = None,
) -> Tensor:
    """Causal attention of a span's new tokens over its session's keys and values, theirs included (already written).

    query [H, Q, D] stand at [position, position + Q); `window` limits each to its last `window` keys.
    Returns [Q, H, D].
    """
    chosen = choose(query, span, layer, scaling, window, rope)
    if chosen is None:
        return attend_all(query, span, layer, scaling, window, scratch)
    out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
    attend_chosen([chosen], [out], scaling, scratch)
    return out


def attend_all(
    query: Tensor, span: PackedSpan, layer: int, scaling: float, window: int | None, scratch: Scratch
) -> Tensor:
    """`attend` where no policy chooses."""
    keys, values = span.cache.keys[layer], span.cache.values[layer]
    if few_tokens_supported(query):
        return attend_few(query, keys, values, span.position, window, scaling, scratch)
    # keys in [first, last) take part; those in [open_end, last) differ by query and are masked
    first = max(0, span.position - window + 1) // KEY_GRANULE * KEY_GRANULE if window else 0
    last = -(-(span.position + query.shape[1]) // KEY_GRANULE) * KEY_GRANULE
    open_end = first if window else min(span.position + 1, last)
    mask = span.mask(open_end, last - open_end, window)
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
    if packed.gives_way is not None and packed.gives_way():
        raise InterruptedStepError
    heads, spans, scratch = query[0], packed.spans, packed.scratch
    if len(spans) == 1 and heads.shape[1] == spans[0].end - spans[0].start:
        alone = attend(heads, spans[0], layer, scaling, sliding_window, scratch, packed.rope)[None]
        spans[0].cache.release(layer)
        return alone, None
    out = heads.new_zeros(heads.shape[1], heads.shape[0], heads.shape[2])
    few: list[tuple[PackedSpan, ChosenSpan]] = []  # in one call: to wake the threads costs as much as one of them
    for span in spans:
        rows = slice(span.start, span.end)
        chosen = choose(heads[:, rows], span, layer, scaling, sliding_window, packed.rope)
        if chosen is None:
            out[rows] = attend_all(heads[:, rows], span, layer, scaling, sliding_window, scratch)
            span.cache.release(layer)
        else:
            few.append((span, chosen))
    attend_chosen([chosen for _, chosen in few], [out[span.start : span.end] for span, _ in few], scaling, scratch)
    for span, _ in few:
        span.cache.release(layer)
    return out[None], None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The attention function masks by position itself; without this transformers builds a full mask every step."""


def register() -> None:
    """Make `NAME` an attention implementation of transformers. Idempotent."""
    AttentionInterface.register(NAME, sessiond_attention)
    AttentionMaskInterface.register(NAME, no_mask)
