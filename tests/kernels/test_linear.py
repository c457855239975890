"""The product of few rows against fp64, on awkward shapes; and that a row does not see its neighbours."""

from __future__ import annotations

import pytest
import torch
from engine_harness import torch_threads
from kernel_marks import needs_avx512_bf16

from sessiond.kernels import linear as module
from sessiond.kernels.linear import MOST_ROWS, linear, linear_reference

# One rounding to bf16 (2^-9 of the value), and fp32 sums.
TOLERANCE = 2**-8


def operands(rows, n_in, n_out, bias, seed=0):
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, n_in).bfloat16(), torch.randn(n_out, n_in).bfloat16()
    return x, weight, torch.randn(n_out).bfloat16() if bias else None


def exact(x, weight, bias):
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


@pytest.fixture
def no_fallback(monkeypatch):
    def refuse(*args):
        raise AssertionError("the reference was used")

    monkeypatch.setattr(module, "linear_reference", refuse)


@needs_avx512_bf16
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "n_in", "n_out"),
    [(1, 32, 1), (1, 576, 1536), (2, 64, 15), (3, 96, 17), (5, 576, 64), (7, 1536, 130), (32, 32, 48), (31, 64, 3)],
)
def test_the_kernel_computes_the_product(no_fallback, rows, n_in, n_out, bias, threads):
    x, weight, offset = operands(rows, n_in, n_out, bias)
    with torch_threads(threads):
        out = linear(x, weight, offset)
    expected = exact(x, weight, offset)
    assert out.shape == expected.shape
    assert out.dtype is torch.bfloat16
    assert (out.double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


@needs_avx512_bf16
def test_a_row_alone_and_beside_others_is_the_same_to_the_bit(no_fallback):
    x, weight, offset = operands(MOST_ROWS, 576, 83, True)
    whole = linear(x, weight, offset)
    for first, last in ((0, 1), (3, 5), (7, 10), (0, 31)):
        assert torch.equal(linear(x[first:last], weight, offset), whole[first:last])


@needs_avx512_bf16
def test_leading_axes_and_strides_are_kept(no_fallback):
    x, weight, _ = operands(6, 64, 20, False)
    assert torch.equal(linear(x.view(1, 2, 3, 64), weight), linear(x, weight).view(1, 2, 3, 20))
    wide = torch.randn(6, 128).bfloat16()
    assert torch.equal(linear(wide[:, ::2], weight), linear(wide[:, ::2].contiguous(), weight))


@needs_avx512_bf16
def test_infinities_and_nan_pass_through(no_fallback):
    x, weight, _ = operands(2, 64, 16, False)
    x[1, 5] = float("nan")
    out = linear(x, weight)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize(
    ("rows", "n_in", "dtype"),
    [(MOST_ROWS + 1, 64, torch.bfloat16), (1, 33, torch.bfloat16), (1, 64, torch.float32), (0, 64, torch.bfloat16)],
)
def test_everything_else_goes_to_torch(rows, n_in, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, n_in, dtype=dtype), torch.randn(5, n_in, dtype=dtype)
    assert torch.equal(linear(x, weight), linear_reference(x, weight))
