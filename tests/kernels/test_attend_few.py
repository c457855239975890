"""Attention of few tokens against the definition in fp64, on awkward shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from engine_harness import torch_threads
from kernel_marks import needs_avx512_bf16
from torch import Tensor

from sessiond.kernels.attention import MOST_TOKENS, Scratch, attend_few, few_tokens_supported

pytestmark = needs_avx512_bf16

# Weights and the result are rounded to bf16, once each. Measured: 3.5e-3 of the largest value.
TOLERANCE = 8e-3
CAPACITY = 1536


def definition(
    query: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None, scaling: float
) -> Tensor:
    n_heads, n_new, head_dim = query.shape
    share = n_heads // keys.shape[0]
    out = torch.empty(n_new, n_heads, head_dim, dtype=torch.float64)
    for i, head in itertools.product(range(n_new), range(n_heads)):
        end = position + i + 1
        start = max(0, end - window) if window else 0
        scores = keys[head // share, start:end].double() @ query[head, i].double() * scaling
        out[i, head] = scores.softmax(0) @ values[head // share, start:end].double()
    return out


def operands(n_heads, n_groups, n_new, head_dim, seed=0):
    torch.manual_seed(seed)
    query = torch.randn(n_heads, n_new, head_dim).bfloat16()
    keys, values = torch.randn(2, n_groups, CAPACITY, head_dim).bfloat16()
    return query, keys, values


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n_heads", "n_groups", "n_new", "head_dim", "position", "window"),
    [
        (9, 3, 1, 64, 0, None),
        (9, 3, 1, 64, 1000, None),
        (9, 3, 1, 64, 1535, None),
        (9, 3, 20, 64, 777, None),
        (9, 3, MOST_TOKENS, 64, 0, None),
        (4, 1, 5, 32, 130, 16),
        (4, 1, 5, 32, 3, 16),
        (1, 1, 2, 32, 127, 1),
        (8, 8, 32, 128, 600, 100),
        (6, 2, 3, 96, 1279, None),
        (4, 4, 1, 256, 50, 7),
        (22, 2, 1, 64, 1024, 512),
    ],
)
def test_the_kernel_computes_attention(n_heads, n_groups, n_new, head_dim, position, window, threads):
    query, keys, values = operands(n_heads, n_groups, n_new, head_dim)
    scaling = head_dim**-0.5
    with torch_threads(threads):
        out = attend_few(query, keys, values, position, window, scaling, Scratch())
    expected = definition(query, keys, values, position, window, scaling)
    assert (out.double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_large_scores_neither_overflow_nor_vanish():
    query, keys, values = operands(3, 1, 2, 64)
    query *= 60
    out = attend_few(query, keys, values, 900, None, 1.0, Scratch())
    expected = definition(query, keys, values, 900, None, 1.0)
    assert out.isfinite().all()
    assert (out.double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_the_result_depends_on_neither_threads_nor_what_lies_beyond_the_last_key():
    query, keys, values = operands(9, 3, 3, 64)
    with torch_threads(1):
        alone = attend_few(query, keys, values, 1111, None, 0.125, Scratch())
    keys[:, 1114:], values[:, 1114:] = 100.0, -7.0
    scratch = Scratch()
    scratch.take("states", 1 << 20, torch.float32).fill_(torch.nan)
    with torch_threads(2):
        assert torch.equal(attend_few(query, keys, values, 1111, None, 0.125, scratch), alone)


def test_keys_may_be_a_part_of_longer_memory():
    query, keys, values = operands(6, 3, 2, 64)
    expected = attend_few(query, keys[:, :640].contiguous(), values[:, :640].contiguous(), 600, None, 0.125, Scratch())
    assert torch.equal(attend_few(query, keys, values, 600, None, 0.125, Scratch()), expected)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, MOST_TOKENS + 1, 64), torch.bfloat16), ((2, 1, 48), torch.bfloat16), ((2, 1, 64), torch.float32)],
)
def test_what_the_kernel_cannot_do_is_left_to_the_reference(shape, dtype):
    assert not few_tokens_supported(torch.zeros(shape, dtype=dtype))
    assert few_tokens_supported(torch.zeros(2, 1, 64, dtype=torch.bfloat16))


def test_a_key_that_is_no_number_makes_what_sees_it_no_number():
    query, keys, values = operands(3, 1, 2, 64)
    keys[0, 900] = torch.nan
    out = attend_few(query, keys, values, 899, None, 0.125, Scratch())  # new tokens at 899 and 900
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    keys[0, 10] = torch.nan
    assert attend_few(query, keys, values, 899, None, 0.125, Scratch()).isnan().all()
