"""The Triton twin of quantizing and packing gives the same bytes as policies/quantized.py."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, Draw

from sessiond.kernels.triton_encode import encode_rows
from sessiond.policies.quantized import Codes


def encoded(rows: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, written between rows of others that must stay as they are."""
    n_heads, n, width = rows.shape
    codes = torch.full((n_heads, n + 2, -(-width * bits // 8)), 77, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((n_heads, n + 2, 2 * -(-width // (group or width))), 77.0, device=DEVICE).bfloat16()
    encode_rows(rows, bits, group, codes[:, 1:-1], scales[:, 1:-1])
    assert all(bool((part[:, [0, -1]] == 77).all()) for part in (codes, scales))
    return codes[:, 1:-1].cpu(), scales[:, 1:-1].cpu()


def same(rows: torch.Tensor, bits: int, group: int) -> bool:
    """Whether the twin writes what the reference does."""
    wanted = Codes(bits, group)
    wanted.extend(rows.cpu())
    codes, scales = encoded(rows, bits, group)
    n = rows.shape[1]
    return torch.equal(codes, wanted._codes[:, :n]) and torch.equal(scales, wanted._scales[:, :n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("width", "group", "n"), [(32, 0, 1), (64, 32, 15), (80, 32, 17), (80, 0, 16), (34, 16, 33)])
def test_the_same_bytes_as_the_reference(width, group, n, bits, dtype):
    assert same(Draw().cached(2, n, width, dtype), bits, group)


def test_more_rows_than_a_tile():
    assert same(Draw().cached(1, 1000, 64, torch.bfloat16), 4, 32)


def test_halves_are_rounded_to_even_like_the_reference():
    """Steps of a half between levels: rounding up instead would write other codes."""
    rows = torch.cat([torch.arange(0, 7.5, 0.5), torch.tensor([15.0])]).expand(1, 1, -1).contiguous().to(DEVICE)
    assert same(rows, 4, 0)
    codes, _ = encoded(rows, 4, 0)
    assert (codes[0, 0] & 15).tolist() == [0, 0, 1, 2, 2, 2, 3, 4]


def test_rows_that_vary_by_nothing():
    assert same(torch.full((2, 3, 32), 0.7, device=DEVICE), 4, 16)
    assert same(torch.zeros(2, 3, 32, device=DEVICE), 2, 0)


def test_what_does_not_fit_is_refused():
    rows = Draw().normal(2, 4, 32)
    codes = torch.zeros(2, 4, 16, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(2, 4, 4, device=DEVICE).bfloat16()
    for wrong in ((codes[:, :3], scales), (codes, scales[..., :2]), (codes.int(), scales), (codes, scales.float())):
        with pytest.raises(ValueError, match="codes"):
            encode_rows(rows, 4, 16, *wrong)
    with pytest.raises(ValueError, match="one after another"):
        encode_rows(rows.mT.contiguous().mT, 4, 16, codes, scales)
