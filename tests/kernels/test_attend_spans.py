"""The compiled attention against the definition in fp64, on awkward shapes and every level of instructions."""

from __future__ import annotations

import itertools

import pytest
import torch
from engine_harness import torch_threads
from kernel_marks import needs_build
from torch import Tensor

from sessiond.kernels.attention import (
    AttentionSpan,
    Scratch,
    attend_few,
    attend_spans,
    native_attention_supported,
)
from sessiond.kernels.native_library import ISA, lib

pytestmark = needs_build

# Weights and the result are rounded to bf16, once each. Measured: 3.5e-3 of the largest value.
TOLERANCE = 8e-3
CAPACITY = 1536


@pytest.fixture(params=range(ISA + 1), ids=["portable", "avx2", "avx512"][: ISA + 1])
def level(request):
    lib.limit_isa(request.param)
    yield
    lib.limit_isa(ISA)


def definition(
    query: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None, scaling: float
) -> Tensor:
    """One head at a time, fp64. Returns [Q, H, D]."""
    n_heads, n_new, head_dim = query.shape
    share = n_heads // keys.shape[0]
    out = torch.empty(n_new, n_heads, head_dim, dtype=torch.float64)
    places = torch.arange(position + n_new)
    own = torch.arange(position, position + n_new)[:, None]
    hidden = places > own
    if window:
        hidden |= places <= own - window
    for head in range(n_heads):
        scores = query[head].double() @ keys[head // share, : len(places)].double().T * scaling
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[:, head] = weights @ values[head // share, : len(places)].double()
    return out


def operands(n_heads, n_groups, n_new, head_dim, seed=0):
    torch.manual_seed(seed)
    query = torch.randn(n_heads, n_new, head_dim).bfloat16()
    keys, values = torch.randn(2, n_groups, CAPACITY, head_dim).bfloat16()
    return query, keys, values


def assert_close(out: Tensor, expected: Tensor) -> None:
    assert (out.double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


SHAPES = [
    (9, 3, 1, 64, 0, None),
    (9, 3, 1, 64, 1000, None),
    (9, 3, 1, 64, 1535, None),
    (9, 3, 20, 64, 777, None),
    (9, 3, 128, 64, 0, None),
    (9, 3, 128, 64, 1408, None),
    (9, 3, 33, 64, 1100, 200),
    (4, 1, 5, 32, 130, 16),
    (4, 1, 5, 32, 3, 16),
    (1, 1, 2, 32, 127, 1),
    (1, 1, 97, 32, 64, 1),
    (8, 8, 32, 128, 600, 100),
    (6, 2, 3, 96, 1279, None),
    (4, 4, 1, 256, 50, 7),
    (4, 2, 70, 256, 300, None),
    (14, 2, 40, 64, 1024, None),
    (14, 2, 1, 64, 1024, 512),
    (22, 2, 1, 64, 1024, 512),
    (200, 1, 2, 32, 100, None),
]


@pytest.mark.parametrize(("n_heads", "n_groups", "n_new", "head_dim", "position", "window"), SHAPES)
def test_the_kernel_computes_attention(level, n_heads, n_groups, n_new, head_dim, position, window):
    query, keys, values = operands(n_heads, n_groups, n_new, head_dim)
    scaling = head_dim**-0.5
    out = attend_few(query, keys, values, position, window, scaling, Scratch())
    assert_close(out, definition(query, keys, values, position, window, scaling))


def test_every_length_of_history(level):
    for position, n_new in itertools.product(range(0, 140, 3), (1, 3, 17)):
        query, keys, values = operands(3, 1, n_new, 32)
        out = attend_few(query, keys, values, position, None, 0.2, Scratch())
        assert_close(out, definition(query, keys, values, position, None, 0.2))


def ragged_batch():
    """Spans of different lengths over memories of their own, with room for the results."""
    spans = []
    for seed, (n_new, position) in enumerate([(1, 1200), (0, 5), (128, 1300), (1, 0), (20, 700), (1, 1535), (40, 63)]):
        query, keys, values = operands(9, 3, n_new, 64, seed)
        spans.append(AttentionSpan(query, keys, values, position, torch.full((n_new, 9, 64), torch.nan).bfloat16()))
    return spans


@pytest.mark.parametrize("window", [None, 300])
def test_a_span_comes_out_the_same_alone_and_beside_others_with_any_number_of_threads(level, window):
    together = ragged_batch()
    with torch_threads(2):
        attend_spans(together, window, 0.125, Scratch())
    for span, other in zip(ragged_batch(), together, strict=True):
        with torch_threads(1):
            attend_spans([span], window, 0.125, Scratch())
        assert torch.equal(span.out, other.out)
        if span.out.numel():
            expected = definition(span.query, span.keys, span.values, span.position, window, 0.125)
            assert_close(other.out, expected)


def test_rows_of_a_packed_step_are_read_and_written_where_they_lie(level):
    """Queries token by token inside a longer projection, results in rows of a packed output."""
    query, keys, values = operands(9, 3, 20, 64)
    packed = torch.full((50, 15, 64), torch.nan).bfloat16()
    packed[7:27, :9] = query.transpose(0, 1)
    out = torch.full((50, 9, 64), torch.nan).bfloat16()
    span = AttentionSpan(packed[7:27, :9].transpose(0, 1), keys, values, 600, out[7:27])
    attend_spans([span], None, 0.125, Scratch())
    assert torch.equal(out[7:27], attend_few(query, keys, values, 600, None, 0.125, Scratch()))
    assert out[:7].isnan().all()
    assert out[27:].isnan().all()


@pytest.mark.parametrize("n_new", [2, 40])
def test_large_scores_neither_overflow_nor_vanish(level, n_new):
    query, keys, values = operands(3, 1, n_new, 64)
    query *= 60
    out = attend_few(query, keys, values, 900, None, 1.0, Scratch())
    assert out.isfinite().all()
    assert_close(out, definition(query, keys, values, 900, None, 1.0))


@pytest.mark.parametrize("n_new", [1, 3, 50])
def test_what_lies_beyond_the_last_key_and_in_the_scratch_does_not_matter(level, n_new):
    query, keys, values = operands(9, 3, n_new, 64)
    alone = attend_few(query, keys, values, 1111, None, 0.125, Scratch())
    keys[:, 1111 + n_new :], values[:, 1111 + n_new :] = 100.0, -7.0
    scratch = Scratch()
    scratch.take("states", 1 << 20, torch.float32).fill_(torch.nan)
    assert torch.equal(attend_few(query, keys, values, 1111, None, 0.125, scratch), alone)


@pytest.mark.parametrize("n_new", [2, 33])
def test_keys_may_be_a_part_of_longer_memory(level, n_new):
    query, keys, values = operands(6, 3, n_new, 64)
    short = keys[:, :640].contiguous(), values[:, :640].contiguous()
    expected = attend_few(query, *short, 600, None, 0.125, Scratch())
    assert torch.equal(attend_few(query, keys, values, 600, None, 0.125, Scratch()), expected)


@pytest.mark.parametrize("n_new", [2, 40])
def test_a_key_that_is_no_number_makes_what_sees_it_no_number(level, n_new):
    query, keys, values = operands(3, 1, n_new, 64)
    keys[0, 899 + n_new - 1] = torch.nan
    out = attend_few(query, keys, values, 899, None, 0.125, Scratch())
    assert out[:-1].isfinite().all()
    assert out[-1].isnan().all()
    keys[0, 10] = torch.nan
    assert attend_few(query, keys, values, 899, None, 0.125, Scratch()).isnan().all()


def test_what_the_kernel_cannot_do_is_left_to_the_reference():
    here = torch.device("cpu")
    assert native_attention_supported(torch.bfloat16, 64, here)
    assert not native_attention_supported(torch.bfloat16, 48, here)
    assert not native_attention_supported(torch.bfloat16, 288, here)
    assert not native_attention_supported(torch.float32, 64, here)


def wrong_spans():
    query, keys, values = operands(6, 3, 2, 64)
    out = torch.empty(2, 6, 64).bfloat16()
    good = query, keys, values, 100, out
    for place, other in [
        (0, query.float()),
        (0, query[:5]),
        (0, query[..., :32]),
        (1, keys[:2]),
        (1, keys[:, ::2]),
        (2, values[:, :640].contiguous()),
        (3, CAPACITY - 1),
        (3, -1),
        (4, out[:1]),
        (4, out.transpose(0, 1).contiguous().transpose(0, 1)),
    ]:
        yield AttentionSpan(*good[:place], other, *good[place + 1 :])


@pytest.mark.parametrize("span", list(wrong_spans()))
def test_what_does_not_fit_never_reaches_the_kernel(span):
    with pytest.raises(ValueError, match=r"kernel takes|do not fit|lie alike|not readable|no room"):
        attend_spans([span], None, 0.125, Scratch())


def test_no_spans_are_no_work():
    attend_spans([], None, 0.125, Scratch())
