"""Products by the compiled kernel against their references, on every level of instructions that this processor has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine_harness import torch_threads
from kernel_marks import needs_build

from sessiond.kernels.blockweights import BlockWeights, linear_blocks_reference, quantize
from sessiond.kernels.matrix import Matrix, interleaved, stacked
from sessiond.kernels.native_library import ISA, lib

pytestmark = needs_build

SIZES = [(1, 32), (16, 64), (17, 96), (50, 64), (200, 576), (2100, 32)]  # outputs, inputs
ROWS = [1, 2, 3, 8, 13, 70]


@pytest.fixture(autouse=True, params=range(ISA + 1), ids=lambda level: ("portable", "avx2", "avx512")[level])
def level(request):
    lib.limit_isa(request.param)
    yield
    lib.limit_isa(2)


def weight_of(n_out: int, n_in: int, bits: int) -> torch.Tensor | BlockWeights:
    weight = (torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(n_out)) * 0.1).bfloat16()
    return weight if bits == 16 else quantize(weight, bits)


def rows_of(n: int, n_in: int) -> torch.Tensor:
    return torch.randn(n, n_in, generator=torch.Generator().manual_seed(n)).bfloat16()


def expected(x: torch.Tensor, weight: torch.Tensor | BlockWeights, bias: torch.Tensor | None = None) -> torch.Tensor:
    if isinstance(weight, BlockWeights):
        return linear_blocks_reference(x.float(), weight, bias)
    return F.linear(x.float(), weight.float(), bias)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_the_reference(bits, size):
    weight, bias = weight_of(*size, bits), torch.randn(size[0])
    matrix, with_bias = Matrix(weight), Matrix(weight, bias)
    for n in ROWS:
        x = rows_of(n, size[1])
        for product, wanted in (
            (matrix.product(x), expected(x, weight)),
            (with_bias.product(x), expected(x, weight, bias)),
        ):
            assert product.shape == (n, size[0])
            torch.testing.assert_close(product, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_row_is_the_same_beside_others_and_on_any_number_of_threads(bits):
    matrix, x = Matrix(weight_of(200, 576, bits)), rows_of(70, 576)
    together = matrix.product(x)
    with torch_threads(2):
        assert torch.equal(matrix.product(x), together)
    for first, last in ((0, 1), (5, 7), (30, 41), (69, 70)):
        assert torch.equal(matrix.product(x[first:last]), together[first:last])


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_is_no_number_stays_none_in_its_row_wherever_it_stands(bits, strange):
    matrix, rows = Matrix(weight_of(20, 64, bits)), rows_of(5, 64)
    for column in range(64):
        x = rows.clone()
        x[2, column] = strange
        product = matrix.product(x)
        assert not product[2].isfinite().any()
        assert product[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_rows_of_zeros_and_of_large_numbers(bits):
    weight = weight_of(48, 64, bits)
    x = torch.stack([torch.zeros(64), torch.full((64,), 3e4), torch.full((64,), 1e-30)]).bfloat16()
    wanted = expected(x, weight)
    torch.testing.assert_close(Matrix(weight).product(x), wanted, rtol=1e-3, atol=1e-3)


def test_weights_put_together_give_their_results_in_that_order():
    parts = [weight_of(n, 64, 4) for n in (32, 64)]
    x = rows_of(3, 64)
    whole = stacked(parts)
    assert whole is not None
    torch.testing.assert_close(Matrix(whole).product(x), torch.cat([Matrix(part).product(x) for part in parts], -1))
    turns = interleaved(weight_of(64, 64, 16), weight_of(64, 64, 8))
    assert turns is None
    gate, up = weight_of(64, 64, 8), quantize(torch.randn(64, 64), 8)
    turns = interleaved(gate, up)
    assert turns is not None
    both = Matrix(turns).product(x).view(3, 2, 2, 32)
    torch.testing.assert_close(both[:, :, 0].flatten(1), Matrix(gate).product(x))
    torch.testing.assert_close(both[:, :, 1].flatten(1), Matrix(up).product(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="32 inputs"):
        Matrix(torch.zeros(4, 40, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bf16"):
        Matrix(torch.zeros(4, 64))
    with pytest.raises(ValueError, match="64 inputs"):
        Matrix(weight_of(4, 64, 16)).product(torch.zeros(2, 32, dtype=torch.bfloat16))
