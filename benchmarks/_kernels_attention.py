"""Attention with the default model's heads: sessions that decode, alone and together, and cells of a prompt."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from _kernelcase import KernelCase, n_cold
from torch import Tensor

from sessiond.kernels.attention import AttentionSpan, Scratch, attend_reference, attend_spans

N_HEADS, N_GROUPS, HEAD_DIM = 9, 3, 64
SCALING = HEAD_DIM**-0.5
CELL = 128


def cases() -> list[KernelCase]:
    decoding = [_case(f"attention decode at {n:,}", 1, n - 1, figure=figure) for n, figure in DECODES]
    together = _case("attention decode 16 sessions at 2,048", 1, 2047, n_sessions=16)
    return [*decoding, together, *(_case(f"attention {CELL} tokens after {n:,}", CELL, n) for n in (0, 2048, 8192))]


DECODES = ((512, ""), (2048, ""), (8192, "attention_bandwidth_share"))


def _case(name: str, n_new: int, position: int, *, n_sessions: int = 1, figure: str = "") -> KernelCase:
    """`n_sessions` with `n_new` tokens each after `position` others."""
    n_keys = position + n_new
    nbytes = 2 * 2 * n_sessions * N_GROUPS * n_keys * HEAD_DIM  # keys and values, two bytes each
    scratch, spans = Scratch(), _spans(n_sessions, n_new, position)
    turn = itertools.cycle([[_copy(span) for span in spans] for _ in range(n_cold(nbytes))])

    def fresh() -> None:
        nonlocal spans
        spans = next(turn)

    def run() -> Tensor:
        attend_spans(spans, None, SCALING, scratch)
        return spans[-1].out

    def reference() -> Tensor:
        return [_reference(span, scratch) for span in spans][-1]

    return KernelCase(
        name=name,
        run=run,
        reference=reference,
        nbytes=nbytes,
        multiply_adds=2 * n_sessions * N_HEADS * HEAD_DIM * sum(range(position + 1, n_keys + 1)),
        kind="bf16",
        figure=figure,
        fresh=fresh,
    )


def _spans(n_sessions: int, n_new: int, position: int) -> list[AttentionSpan]:
    capacity = -(-(position + n_new) // 64) * 64
    return [
        AttentionSpan(
            torch.randn(N_HEADS, n_new, HEAD_DIM).bfloat16(),
            torch.randn(N_GROUPS, capacity, HEAD_DIM).bfloat16(),
            torch.randn(N_GROUPS, capacity, HEAD_DIM).bfloat16(),
            position,
            torch.empty(n_new, N_HEADS, HEAD_DIM).bfloat16(),
        )
        for _ in range(n_sessions)
    ]


def _copy(span: AttentionSpan) -> AttentionSpan:
    return replace(span, keys=span.keys.clone(), values=span.values.clone())


def _reference(span: AttentionSpan, scratch: Scratch) -> Tensor:
    """As a model whose heads the kernel does not take goes through it."""
    n_new, capacity = span.query.shape[1], span.keys.shape[1]
    open_end = span.position + 1
    mask = torch.arange(open_end, capacity) > torch.arange(span.position, span.position + n_new)[:, None]
    return attend_reference(span.query, span.keys, span.values, 0, open_end, mask, SCALING, scratch)
