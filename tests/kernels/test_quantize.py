"""Rows in few bits are the reference's to the byte, on every level of instructions."""

from __future__ import annotations

import pytest
import torch
from kernel_marks import levels, needs_build

from sessiond.kernels.quantize import quantize, quantize_reference


def room(n_groups: int, n: int, width: int, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.full((n_groups, n + 5, -(-width * bits // 8)), 255, dtype=torch.uint8)
    return codes[:, 2 : n + 2], torch.zeros(n_groups, n + 5, 2 * -(-width // group)).bfloat16()[:, 2 : n + 2]


@needs_build
@levels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("width", "group"), [(64, 64), (64, 32), (80, 32), (13, 13), (33, 8), (1, 1), (256, 64)])
def test_bytes_are_the_references(level, width, group, bits, dtype):
    torch.manual_seed(width + bits)
    rows = (torch.randn(3, 40, width) * 3 + 1).to(dtype)
    rows[0, 3] = 0.25  # all equal
    rows[1, 4, 0] = 1e30
    rows[1, 5] *= 1e-20
    wanted, found = room(3, 40, width, bits, group), room(3, 40, width, bits, group)
    quantize_reference(rows, *wanted, bits, group)
    with level:
        for start, end in ((0, 1), (1, 33), (33, 33), (33, 40)):
            quantize(rows[:, start:end], found[0][:, start:end], found[1][:, start:end], bits, group)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@needs_build
@levels
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_spoils_its_own_group_only(level, strange):
    rows = torch.randn(1, 2, 64)
    rows[0, 0, 40] = strange
    codes, scales = room(1, 2, 64, 4, 32)
    with level:
        quantize(rows, codes, scales, 4, 32)
    assert scales[0, 0, [0, 2]].isfinite().all()
    assert not scales[0, 0, [1, 3]].isfinite().all()
    assert scales[0, 1].isfinite().all()


def test_room_that_does_not_fit_is_refused():
    rows, (codes, scales) = torch.randn(2, 3, 64), room(2, 3, 64, 4, 32)
    for bad in ((codes[:, :2], scales), (codes, scales[..., :2]), (codes[..., :16], scales)):
        with pytest.raises(ValueError, match="codes of shape"):
            quantize(rows, *bad, 4, 32)
