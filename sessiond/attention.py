"""The attention function registered with transformers: each span of a packed step over its own session's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sessiond.cache import KEY_GRANULE, PackedSpan
from sessiond.kernels.attention import Scratch, attend_chosen, attend_few, attend_reference, few_tokens_supported
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
    keys, values = span.cache.keys[layer], span.cache.values[layer]
    if span.selection is not None and window is None:  # a sliding layer sees little as it is
        chosen = span.selection.choose(layer, query, keys, values, span.position, scaling, rope, decoding=span.decoding)
        if chosen is not None:
            own = slice(span.selection.turn_start, span.position + query.shape[1])
            forms = chosen.keys, chosen.values
            return attend_chosen(query, keys, values, chosen.positions, own, scaling, scratch, forms)
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
    for span in spans:
        rows = slice(span.start, span.end)
        out[rows] = attend(heads[:, rows], span, layer, scaling, sliding_window, scratch, packed.rope)
        span.cache.release(layer)
    return out[None], None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The attention function masks by position itself; without this transformers builds a full mask every step."""


def register() -> None:
    """Make `NAME` an attention implementation of transformers. Idempotent."""
    AttentionInterface.register(NAME, sessiond_attention)
    AttentionMaskInterface.register(NAME, no_mask)
