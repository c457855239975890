"""Weights in blocks: rounded to the nearest, no worse than GGUF rounds; products are those of the effective weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_harness import torch_threads

from sessiond.kernels.blockweights import (
    BlockWeights,
    linear_blocks_reference,
    quantize,
    quantize_rows,
)


def weight(n_out=7, n_in=96, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return (torch.randn(n_out, n_in) * 0.05).to(dtype)


def squared_error(weights, original):
    return (weights.dequantize(torch.float64) - original.double()).square().sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 32), (7, 96), (0, 64), (3, 0), (1500, 1024)])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_is_within_half_a_step(bits, n_out, n_in, dtype):
    original = weight(n_out, n_in, dtype=dtype)
    weights = quantize(original, bits)
    assert weights.shape == (n_out, n_in)
    assert n_out * n_in == 0 or int(weights.codes.max()) <= 2**bits - 1
    step = weights.scales.float().repeat_interleave(32, 1)
    wrong = (weights.dequantize() - original.float()).abs()
    # Extremes may be cut where least squares found smaller steps, and where fp16 rounded the scale down.
    allowed = 0.505 if bits == 8 else 1.0
    assert bool((wrong <= allowed * step + 1e-7).all())
    assert float((wrong <= 0.505 * step + 2**-10 * original.float().abs()).float().mean()) > 0.97 or n_out * n_in == 0


def test_least_squares_lower_the_error_of_gguf_rounding():
    original = weight(64, 512)
    theirs = gguf.quants.quantize(original.numpy(), gguf.GGMLQuantizationType.Q4_1)
    plain = torch.from_numpy(gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q4_1))
    plain_error = (plain.double() - original.double()).square().sum().item()
    assert squared_error(quantize(original, 4), original) < 0.95 * plain_error


def test_eight_bits_have_gguf_scales_and_no_larger_error():
    original = weight(64, 512)
    raw = gguf.quants.quantize(original.numpy(), gguf.GGMLQuantizationType.Q8_0)
    scales = torch.from_numpy(raw.reshape(64, 16, 34)[..., :2].copy().view(np.float16))[..., 0]
    weights = quantize(original, 8)
    assert torch.equal(weights.scales, scales)
    theirs = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))
    assert squared_error(weights, original) <= (theirs.double() - original.double()).square().sum().item() * 1.001


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_come_back_unchanged(bits):
    torch.manual_seed(1)
    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8)
    codes.view(5, 2, 32)[..., 0], codes.view(5, 2, 32)[..., 1] = 0 if bits == 4 else 1, 2**bits - 1
    lows = torch.full((5, 2), -0.25).half() if bits == 4 else None
    weights = BlockWeights(bits, codes.clamp(1 if bits == 8 else 0), torch.full((5, 2), 2.0**-6).half(), lows)
    again = quantize(weights.dequantize(), bits)
    assert torch.equal(again.dequantize(), weights.dequantize())
    assert torch.equal(again.codes, weights.codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_constant_blocks_and_zeros_are_kept(bits):
    original = torch.zeros(2, 64)
    original[1] = 0.5
    assert torch.equal(quantize(original, bits).dequantize()[0], original[0])
    assert (quantize(original, bits).dequantize()[1] - 0.5).abs().max() < 5e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_depend_neither_on_threads_nor_on_other_rows(bits):
    original = weight(300, 576)
    with torch_threads(1):
        alone = quantize(original[250:], bits)
    whole = quantize(original, bits)
    assert torch.equal(whole.codes[250:], alone.codes)
    assert torch.equal(whole.scales[250:], alone.scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_cannot_be_quantized_is_refused(bits):
    with pytest.raises(ValueError, match="blocks of 32"):
        quantize(torch.zeros(2, 33), bits)
    for value in (float("nan"), float("inf"), 1e9):
        bad = torch.zeros(2, 32)
        bad[1, 3] = value
        with pytest.raises(ValueError, match="not finite"):
            quantize(bad, bits)


def test_parts_that_do_not_fit_together_are_refused():
    fine = quantize(weight(), 4)
    for parts in (
        (8, fine.codes, fine.scales, fine.lows),
        (4, fine.codes, fine.scales, None),
        (5, fine.codes, fine.scales, fine.lows),
        (4, fine.codes[:, :33], fine.scales, fine.lows),
        (4, fine.codes, fine.scales[:3], fine.lows),
        (4, fine.codes, fine.scales, fine.lows.float()),
        (4, fine.codes.int(), fine.scales, fine.lows),
    ):
        with pytest.raises(ValueError, match=r"bits|codes|scales"):
            BlockWeights(*parts)


def test_rows_are_rounded_to_the_nearest_even_by_block():
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    codes, scales = quantize_rows(x)
    assert codes[0, :4].tolist() == [127, 0, 2, -2]
    assert scales.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(1, 32, 1), (3, 96, 17), (5, 576, 64), (0, 64, 3), (33, 64, 5)])
def test_the_product_is_that_of_the_effective_weights_but_for_rounded_inputs(rows, n_in, n_out, bits, dtype, bias):
    weights = quantize(weight(n_out, n_in), bits)
    torch.manual_seed(2)
    x, offset = torch.randn(rows, n_in).to(dtype), torch.randn(n_out).to(dtype) if bias else None
    out = linear_blocks_reference(x, weights, offset)
    assert out.shape == (rows, n_out)
    assert out.dtype is dtype
    effective = weights.dequantize(torch.float64)
    expected = F.linear(x.double(), effective, None if offset is None else offset.double())
    # Half a step of the block's scale an input, and a rounding of the result.
    step = quantize_rows(x)[1].double().repeat_interleave(32, 1)
    allowed = 0.5 * step @ effective.abs().T + expected.abs() * 2**-8 + 1e-6
    assert bool(((out.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_product_of_whole_numbers_is_exact(bits):
    torch.manual_seed(3)
    x = torch.randint(-127, 128, (4, 64)).float()
    x.view(4, 2, 32)[..., 5] = 127
    codes = torch.randint(0, 2**bits, (9, 64), dtype=torch.uint8)
    ones = torch.ones(9, 2).half()
    weights = BlockWeights(bits, codes, ones, -3 * ones if bits == 4 else None)
    expected = x.double() @ (codes.double() - (3 if bits == 4 else 128)).T
    assert torch.equal(linear_blocks_reference(x, weights).double(), expected)


def test_leading_axes_are_kept_and_nan_stays_in_its_row():
    weights = quantize(weight(), 4)
    x = torch.randn(2, 3, 96)
    assert torch.equal(linear_blocks_reference(x, weights).view(6, 7), linear_blocks_reference(x.view(6, 96), weights))
    x[1, 2, 40] = float("nan")
    out = linear_blocks_reference(x, weights)
    assert bool(out[1, 2].isnan().all())
    assert bool(out[0].isfinite().all())
