"""Attention over chosen positions, against a loop over heads and queries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_harness import torch_threads
from kernel_marks import needs_build
from torch import Tensor

from sessiond.kernels import chosen as module
from sessiond.kernels.attention import Scratch
from sessiond.kernels.chosen import ChosenSpan, attend_chosen, attend_chosen_reference, positions_told, supported
from sessiond.kernels.coded import CodedRows
from sessiond.kernels.native_library import ISA, lib
from sessiond.policies.quantized import Codes

G, H, START, CAPACITY = 2, 6, 500, 640
# Weights, with the scale of codes in them, and the result are rounded to bf16. Measured: 4.6e-3 of the largest value.
TOLERANCE = 9e-3


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    if request.param > ISA:
        pytest.skip("this processor has no such instructions, or no kernels are built")
    lib.limit_isa(request.param)
    yield request.param
    lib.limit_isa(2)


def expected(span: ChosenSpan, scaling: float) -> Tensor:
    """[Q, H, D], one head and query at a time, fp64."""
    query, own, n_new = span.query, span.own, span.query.shape[1]
    out = torch.zeros(n_new, len(query), query.shape[2], dtype=torch.float64)
    for head, i in itertools.product(range(len(query)), range(n_new)):
        group = head // (len(query) // len(span.keys))
        there = span.chosen[group] >= 0
        mine = slice(own.start, own.stop - n_new + i + 1)
        keys, values = (
            torch.cat([numbers(span, part)[group][there].double(), source[group, mine].double()])
            for part, source in enumerate((span.keys, span.values))
        )
        out[i, head] = (keys @ query[head, i].double() * scaling).softmax(0) @ values
    return out


def numbers(span: ChosenSpan, part: int) -> Tensor:
    """What stands at the chosen positions for keys (0) or values (1): [G, K, D]."""
    form, source = span.forms[part], (span.keys, span.values)[part]
    if isinstance(form, CodedRows):
        return form.at(span.chosen, torch.float32)
    if form is not None:
        return form
    return torch.stack([rows[at.clamp(min=0)] for rows, at in zip(source, span.chosen, strict=True)])


def coded(rows: Tensor, bits: int, group: int) -> CodedRows:
    codes = Codes(bits, group)
    codes.extend(rows[:, :START])
    return codes.rows(START)


def make(
    k: int = 37,
    n_new: int = 1,
    head_dim: int = 64,
    bits: int = 0,
    group: int = 32,
    *,
    n_own: int = 0,
    ragged: bool = False,
    whole: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 7,
) -> ChosenSpan:
    """The queries lie as a model gives them: [Q, H, D] in memory. `n_own`: tokens of the turn before them."""
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(n_new, H, head_dim, generator=draw).to(dtype).transpose(0, 1)
    keys, values = (torch.randn(G, CAPACITY, head_dim, generator=draw).to(dtype) for _ in range(2))
    chosen = torch.stack([torch.randperm(START, generator=draw)[:k].sort().values for _ in range(G)])
    chosen = torch.arange(k).expand(G, -1) if whole else chosen
    if ragged:
        chosen[1, k // 2 :] = -1
    forms = (coded(keys, bits, group), coded(values, bits, group)) if bits else (None, None)
    return ChosenSpan(query, keys, values, chosen, slice(START, START + n_own + n_new), forms, whole)


def run(*spans: ChosenSpan, scaling: float = 0.125) -> list[Tensor]:
    scratch = Scratch()
    scratch.take("chosen", 1 << 20, torch.float32).fill_(torch.nan)  # what was there before must not matter
    shapes = [(span.query.shape[1], span.query.shape[0], span.query.shape[2]) for span in spans]
    out = [torch.full(shape, torch.nan, dtype=spans[0].query.dtype) for shape in shapes]
    attend_chosen(spans, out, scaling, scratch)
    return out


def close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max())


@pytest.mark.parametrize("bits", [0, 8, 4, 2])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize(
    ("k", "n_new", "n_own", "ragged"),
    [(0, 1, 0, False), (1, 1, 0, False), (16, 5, 3, True), (37, 1, 20, True), (300, 4, 1, False)],
)
def test_it_is_attention_over_those_positions_and_the_turns_own(level, k, n_new, n_own, ragged, head_dim, bits):
    span = make(k, n_new, head_dim, bits, n_own=n_own, ragged=ragged)
    assert supported(span)
    assert close(run(span)[0], expected(span, 0.125))


@pytest.mark.parametrize(("bits", "group"), [(0, 0), (8, 0), (4, 32), (2, 64)])
def test_positions_may_stand_in_any_order(level, bits, group):
    """Sixteen whose first and last lie as if they were one run: their scales must not be read as one."""
    mixed = torch.cat(
        [torch.tensor([3]), 4 + torch.randperm(14, generator=torch.Generator().manual_seed(0)), torch.tensor([18])]
    )
    span = replace(make(16, 1, 64, bits, group), chosen=mixed.expand(G, -1).contiguous())
    steep = [
        replace(form, scales=form.scales * torch.arange(1, START + 1)[:, None]) if bits else None for form in span.forms
    ]
    span = replace(span, forms=(steep[0], steep[1]))
    assert close(run(span, scaling=0.001)[0], expected(span, 0.001))


@pytest.mark.parametrize(("bits", "group"), [(0, 0), (8, 0), (4, 64), (4, 0), (8, 32)])
def test_all_of_what_came_before_is_read_without_its_positions(level, bits, group):
    span = make(START, 3, 128, bits, group, whole=True)
    assert supported(span)
    found = run(span)[0]
    assert close(found, expected(span, 0.125))
    assert torch.equal(run(replace(span, chosen=span.chosen.contiguous(), whole=False))[0], found)


def test_rows_given_beside_stand_in_for_keys_or_values_alone(level):
    span = make(ragged=True)
    given = torch.randn(G, 37, 64).bfloat16()
    for forms in ((given, None), (None, given), (given, coded(span.values, 4, 32)), (coded(span.keys, 8, 32), None)):
        span = replace(span, forms=forms)
        assert close(run(span)[0], expected(span, 0.125))


def test_many_new_tokens_are_cut_in_blocks():
    span = make(140, 90, bits=4)
    assert close(run(span)[0], expected(span, 0.125))


@needs_build
@pytest.mark.parametrize("threads", [1, 2])
def test_a_span_comes_out_the_same_alone_and_beside_others(level, threads):
    spans = [make(300, seed=1), make(0, seed=2), make(200, 5, bits=4, seed=3), make(37, 30, ragged=True, seed=4)]
    spans.append(make(START, bits=8, whole=True, seed=5))
    with torch_threads(1):
        alone = [run(span)[0] for span in spans]
    with torch_threads(threads):
        assert all(torch.equal(a, b) for a, b in zip(run(*spans), alone, strict=True))


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 10), (torch.bfloat16, 10), (torch.float32, 64)])
@pytest.mark.parametrize("bits", [0, 4])
def test_what_the_kernel_cannot_do_is_left_to_the_reference(dtype, head_dim, bits):
    span = make(21, 5, head_dim, bits, 8, n_own=2, ragged=True, dtype=dtype)
    assert not supported(span)
    assert close(run(span)[0], expected(span, 0.125), 1e-5 if dtype is torch.float32 else 0.02)


@pytest.mark.parametrize("bits", [0, 8])
def test_the_reference_is_the_same_attention(bits):
    span = make(60, 4, bits=bits, ragged=True)
    assert close(attend_chosen_reference(span, 0.125), expected(span, 0.125), 0.02)


@needs_build
def test_without_the_kernel_spans_are_computed_one_by_one(monkeypatch):
    spans = [make(60, 4, seed=1), make(5, bits=4, seed=2)]
    found = run(*spans)
    monkeypatch.setattr(module, "BUILT", False)
    assert all(close(a, b.double(), 0.02) for a, b in zip(run(*spans), found, strict=True))


def test_a_key_that_is_no_number_makes_what_sees_it_no_number(level):
    span = make(37, 2, ragged=True)
    span.keys[0, span.chosen[0, 5]] = torch.nan
    found = run(span)[0]
    assert found[:, : H // G].isnan().all()
    assert found[:, H // G :].isfinite().all()
    span = make(37, 2)
    span.keys[:, START + 1] = torch.nan  # the second token's own
    found = run(span)[0]
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_large_scores_neither_overflow_nor_vanish(level):
    span = make(300, bits=8)
    assert close(run(span, scaling=20.0)[0], expected(span, 20.0))


@pytest.mark.parametrize("wrong", [-2, START, 1 << 40])
def test_no_position_is_read_that_does_not_come_before_the_turn(wrong):
    span = make()
    span.chosen[1, 3] = wrong
    with pytest.raises(ValueError, match="outside"):
        positions_told(span.chosen, START)
    if supported(span):
        with pytest.raises(ValueError, match="outside"):
            run(span)


def test_positions_are_told_apart_by_whether_some_are_none():
    span = make(ragged=True)
    for at in (span.chosen, span.chosen.int(), span.chosen.T.contiguous().T):
        assert positions_told(at, START)
        assert not positions_told(at[:, :2], START)
    assert not positions_told(torch.arange(START).expand(G, -1), START)
    assert not positions_told(torch.empty(G, 0, dtype=torch.int64), START)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"own": slice(START, START)}, "1 of them new"),
        ({"own": slice(START, CAPACITY + 1)}, f"of {CAPACITY} tokens"),
        ({"chosen": torch.zeros(1, 4, dtype=torch.int64)}, "chosen"),
        ({"query": torch.zeros(H, 1, 32).bfloat16()}, "query"),
        ({"query": torch.zeros(5, 1, 64).bfloat16()}, "query"),
        ({"values": torch.zeros(G, 600, 64).bfloat16()}, "query"),
        ({"forms": (torch.zeros(G, 36, 64).bfloat16(), None)}, "a form"),
        ({"forms": (None, coded(torch.zeros(G, START - 1, 64), 4, 32))}, "codes"),
        ({"forms": (None, coded(torch.zeros(1, START, 64), 4, 32))}, "codes"),
        ({"forms": (None, coded(torch.zeros(G, START, 32), 8, 32))}, "codes"),
        ({"chosen": torch.arange(START + 1).expand(G, -1), "whole": True}, "positions before"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(change: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        run(replace(make(), **change))


@needs_build
@pytest.mark.parametrize("other", [make(head_dim=128), make(dtype=torch.float32)], ids=["head_dim", "dtype"])
def test_spans_of_other_heads_never_reach_the_kernel_together(other: ChosenSpan):
    spans = [make(), other]
    out = [torch.empty(span.query.shape[1], H, span.query.shape[2], dtype=span.query.dtype) for span in spans]
    with pytest.raises(ValueError, match="different heads"):
        attend_chosen(spans, out, 0.125, Scratch())


@needs_build
def test_what_is_written_has_the_type_of_the_query():
    with pytest.raises(ValueError, match="type"):
        attend_chosen([make()], [torch.empty(1, H, 64, dtype=torch.uint8)], 0.125, Scratch())
