"""The Triton twin of keys of low rank, against policies/lowrank.py and the rotation of kernels/rope.py."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, DTYPES, GPU, Draw, close

from sessiond.kernels.rope import Rope
from sessiond.kernels.triton_lowrank import reconstruct_keys
from sessiond.policies.lowrank import LowRank


def factors(n: int, n_groups: int, head_dim: int, rank: int) -> LowRank:
    rows = Draw().normal(n, n_groups * head_dim).cpu() + 3
    held = LowRank(rank, 0.9, 0.1)
    held.cover(lambda start, end: rows[start:end], n)
    return held


def reconstructed(held: LowRank, positions: torch.Tensor, rope: Rope, dtype: torch.dtype) -> torch.Tensor:
    kept = torch.bfloat16 if GPU else torch.float32  # the interpreter has no products in bf16
    coordinates, basis = held._coordinates.to(DEVICE, kept), held._basis.to(DEVICE, kept)
    return reconstruct_keys(coordinates, basis, held._mean.to(DEVICE), positions, rope, dtype)


# rank, head_dim, channels that rotate, keys held, keys taken
SHAPES = [
    (1, 32, 32, 15, 1),
    (17, 64, 64, 130, 100),
    (70, 80, 80, 200, 17),
    (16, 80, 64, 200, 16),
    (64, 128, 128, 300, 15),
    (16, 32, 32, 20, 0),
]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("rank", "head_dim", "n_rotating", "n", "k"), SHAPES)
def test_they_are_the_references_keys(rank, head_dim, n_rotating, n, k, dtype, tolerance):
    held = factors(n, 2, head_dim, rank)
    rope = Rope(10000.0 ** -(torch.arange(0, n_rotating, 2) / n_rotating), 1.2)
    positions = Draw().positions(2, k, n)
    found = reconstructed(held, positions, rope, dtype)
    assert found.dtype is dtype
    wanted = rope.rotate(held.take(positions.cpu()), positions.cpu())
    assert close(found, wanted, 10 * tolerance)  # numbers about 10


def test_no_position_gives_zeros():
    positions = torch.tensor([[3, 4, -1], [5, -1, -1]], device=DEVICE)
    found = reconstructed(factors(20, 2, 32, 16), positions, Rope(torch.rand(8)), torch.float32)
    assert torch.equal(found.any(-1), positions >= 0)


def test_angles_are_exact_far_out():
    """Where a product of fewer bits, or a cosine without reduction of its argument, is far off."""
    n = 100_000
    rope = Rope(torch.ones(16))
    coordinates, basis = torch.zeros(n, 1, device=DEVICE), torch.zeros(32, 1, device=DEVICE)
    positions = torch.tensor([[n - 1, n - 2, 65_537]], device=DEVICE)
    found = reconstruct_keys(coordinates, basis, torch.ones(32, device=DEVICE), positions, rope, torch.float32)
    assert close(found, rope.rotate(torch.ones(1, 3, 32), positions.cpu()), 1e-5)


def test_what_does_not_fit_is_refused():
    held, positions = factors(20, 2, 32, 16), Draw().positions(2, 4, 20)
    for rope, taken in ((Rope(torch.rand(17)), positions), (Rope(torch.rand(16)), positions[:1].expand(3, -1))):
        with pytest.raises(ValueError, match="basis"):
            reconstructed(held, taken, rope, torch.float32)
