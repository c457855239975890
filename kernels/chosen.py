"""Attention over a set of earlier positions and over a turn's own tokens, read where they lie: nothing is copied.

What is chosen may stand there in another form: as rows given beside it, or in few bits (kernels/coded.py), whose
products the compiled kernel takes before it scales them. The kernel serves the spans of a step in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sessiond.kernels.attention import Scratch
from sessiond.kernels.coded import CodedRows
from sessiond.kernels.native_library import BUILT, ISA, ffi, lib

# Without AVX-512 torch's matrix products are the faster way for more new tokens.
MOST_TOKENS = 32
MOST_GROUPS = 16  # of channels with a scale of their own

Form = Tensor | CodedRows | None


@dataclass(frozen=True, slots=True, eq=False)
class ChosenSpan:
    """New tokens of one session: query [H, Q, D] over `chosen` [G, K] of keys and values [G, T, D], and over `own`.

    `own` is a run of positions that ends with the queries' own, and is seen causally; what is chosen lies before it.
    Rows of `chosen` may end with -1: no position. `whole`: it is [0, K) in every row, and not read. `forms` stand in
    for keys and for values at the chosen positions: a tensor [G, K, D] in their order, or coded rows by position.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    chosen: Tensor
    own: slice
    forms: tuple[Form, Form] = (None, None)
    whole: bool = False


def attend_chosen_reference(span: ChosenSpan, scaling: float) -> Tensor:
    """[Q, H, D]. Scores and softmax in fp32, weights rounded to the model's dtype."""
    query, chosen, own = span.query, span.chosen, span.own
    (n_groups, k), (_, n_new, head_dim) = chosen.shape, query.shape
    taken = []
    for source, form in zip((span.keys, span.values), span.forms, strict=True):
        if isinstance(form, CodedRows):
            form = form.at(None if span.whole else chosen, source.dtype)[:, :k]
        elif form is None:
            form = source.gather(1, chosen.clamp(min=0)[..., None].expand(-1, -1, head_dim))
        taken.append(torch.cat([form, source[:, own]], 1)[:, None])
    n = taken[0].shape[2]
    grouped = query.reshape(n_groups, -1, n_new, head_dim)
    scores = (grouped.float() * scaling) @ taken[0].float().transpose(-1, -2)
    later = torch.arange(n) > torch.arange(n - n_new, n)[:, None]
    absent = torch.cat([chosen < 0, torch.zeros(n_groups, n - k, dtype=torch.bool)], 1)
    weights = scores.masked_fill(later | absent[:, None, None], float("-inf")).softmax(-1)
    # A row that is absent has weight 0, and 0 times no number would be none.
    values = taken[1].masked_fill(absent[:, None, :, None], 0)
    return (weights.to(query.dtype) @ values).reshape(-1, n_new, head_dim).transpose(0, 1)


def attend_chosen(spans: Sequence[ChosenSpan], out: Sequence[Tensor], scaling: float, scratch: Scratch) -> None:
    """Fills out[i] [Q, H, D] with the attention of spans[i], which share H, G, D and dtype.

    A span's result is the same alone and beside others: the order of sums depends on its own lengths only. Raises
    ValueError for shapes that do not belong together and for positions outside of [-1, own.start).
    """
    for span in spans:
        _check(span)
    if len({(len(span.query), span.keys.shape[::2], span.query.dtype) for span in spans}) > 1:
        raise ValueError("spans of different heads or types")
    if not all(supported(span) for span in spans):
        for span, into in zip(spans, out, strict=True):
            into.copy_(attend_chosen_reference(span, scaling))
        return
    if not spans:
        return
    structs = ffi.new("struct chosen_span[]", [_struct(span, into) for span, into in zip(spans, out, strict=True)])
    n_groups, head_dim = spans[0].keys.shape[0], spans[0].keys.shape[2]
    n_share = spans[0].query.shape[0] // n_groups
    n = lib.chosen_plan(structs, len(spans), n_groups, n_share, head_dim)
    states = scratch.take("chosen", n, torch.float32).data_ptr()
    threads = torch.get_num_threads()
    if lib.attend_chosen_bf16(structs, len(spans), n_groups, n_share, head_dim, scaling, states, threads):
        raise ValueError("chosen positions outside of what came before the turn")


def positions_told(positions: Tensor, end: int) -> bool:
    """Whether there are -1 among positions [G, K]. Raises ValueError if one is outside of [-1, end)."""
    if not BUILT or positions.dtype is not torch.int64 or positions.stride(1) != 1:
        least = int(positions.min()) if positions.numel() else 0
        told = -1 if least < -1 or (positions.numel() and int(positions.max()) >= end) else int(least < 0)
    else:
        (n_rows, n), stride = positions.shape, positions.stride(0)
        told = lib.positions_told(positions.data_ptr(), n_rows if stride else 1, stride, n, end)
    if told < 0:
        raise ValueError(f"positions outside [0, {end})")
    return told > 0


def supported(span: ChosenSpan) -> bool:
    """Whether the compiled kernel computes it."""
    query, keys, values = span.query, span.keys, span.values
    head_dim = query.shape[2]
    return (
        BUILT
        and (ISA == 2 or query.shape[1] <= MOST_TOKENS)
        and head_dim % 16 == 0
        and 0 < head_dim <= 256
        and query.dtype is torch.bfloat16
        and query.device.type == "cpu"
        and query.stride(2) == 1
        and _has_rows(keys, head_dim)
        and _has_rows(values, head_dim)
        and span.chosen.dtype is torch.int64
        and span.chosen.stride(1) == 1
        and all(form is None or _form_supported(form, head_dim) for form in span.forms)
    )


def _has_rows(source: Tensor, head_dim: int) -> bool:
    return source.dtype is torch.bfloat16 and source.stride(2) == 1 and source.stride(1) == head_dim


def _form_supported(form: Tensor | CodedRows, head_dim: int) -> bool:
    if isinstance(form, Tensor):
        return _has_rows(form, head_dim)
    n_scales = form.scales.shape[2] // 2
    return (
        n_scales <= MOST_GROUPS
        and (n_scales == 1 or form.group % 32 == 0)
        and form.codes.stride(1) == form.codes.shape[2] == head_dim * form.bits // 8
        and form.scales.stride(1) == form.scales.shape[2]
    )


def _check(span: ChosenSpan) -> None:
    (n_groups, n_tokens, head_dim), (n_heads, n_new, _) = span.keys.shape, span.query.shape
    k, own = span.chosen.shape[1], span.own
    if n_heads % n_groups or span.query.shape[2] != head_dim or span.values.shape != span.keys.shape:
        raise ValueError(f"query {tuple(span.query.shape)}, keys {tuple(span.keys.shape)}")
    if span.chosen.shape[0] != n_groups or not 0 <= own.start <= own.stop - n_new <= own.stop <= n_tokens or not n_new:
        raise ValueError(f"chosen {tuple(span.chosen.shape)} beside {own} of {n_tokens} tokens, {n_new} of them new")
    if span.whole and k > own.start:
        raise ValueError(f"{k} positions before {own.start}")
    for form in span.forms:
        if form is not None:
            _check_form(form, span)


def _check_form(form: Tensor | CodedRows, span: ChosenSpan) -> None:
    n_groups, k = span.chosen.shape
    head_dim = span.keys.shape[2]
    if isinstance(form, CodedRows):
        form.check(n_groups, k if span.whole else span.own.start, head_dim)
    elif form.shape != (n_groups, k, head_dim):
        raise ValueError(f"a form of shape {tuple(form.shape)} for {k} positions")


def _struct(span: ChosenSpan, out: Tensor) -> tuple[object, ...]:
    """`struct chosen_span` of kernels/native/chosen.h."""
    query, keys, values, chosen, own = span.query, span.keys, span.values, span.chosen, span.own
    right = out.shape == (query.shape[1], query.shape[0], query.shape[2]) and out.dtype is query.dtype and out.is_cpu
    if not right or not out.is_contiguous():
        raise ValueError(f"out of shape {tuple(out.shape)} and type {out.dtype}")
    return (
        query.data_ptr(),
        out.data_ptr(),
        0 if span.whole else chosen.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        query.stride(0),
        query.stride(1),
        chosen.stride(0),
        keys.stride(0),
        values.stride(0),
        query.shape[1],
        chosen.shape[1],
        own.start,
        own.stop,
        _rows(span.forms[0], keys),
        _rows(span.forms[1], values),
        0,
        0,
        0,
    )


def _rows(form: Form, exact: Tensor) -> tuple[int, ...]:
    """`struct chosen_rows`."""
    if form is None:
        return exact.data_ptr(), 0, exact.stride(0), 0, 0, 0, 0
    if isinstance(form, Tensor):
        return form.data_ptr(), 0, form.stride(0), 0, 0, 0, 1
    codes, scales = form.codes, form.scales
    group = form.group or form.width
    return codes.data_ptr(), scales.data_ptr(), codes.stride(0), scales.stride(0), form.bits, group, 0
