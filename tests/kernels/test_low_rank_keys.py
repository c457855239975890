"""Keys from factors by the compiled kernel against their reference, on every level of instructions."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_marks import levels, needs_build

from sessiond.kernels.lowrank import Factors, bases_of, low_rank_keys, low_rank_keys_reference
from sessiond.kernels.rope import Rope

N = 70


def rope_of(head_dim: int, share: float = 1.0) -> Rope:
    n_half = int(head_dim * share) // 2
    return Rope(1.0 / 10000.0 ** (torch.arange(n_half) / n_half), 1.5)


def make(n_groups: int, head_dim: int, rank: int) -> tuple[Factors, torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    width = n_groups * head_dim
    factors = Factors(
        torch.randn(N, rank, generator=draw).bfloat16(),
        (torch.randn(width, rank, generator=draw) / rank**0.5).bfloat16(),
        torch.randn(width, generator=draw),
    )
    return factors, torch.randn(n_groups, N + 10, head_dim, generator=draw).bfloat16()


def choice(n_groups: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(k)
    positions = torch.stack([torch.randperm(N, generator=draw)[:k].sort().values for _ in range(n_groups)])
    return positions, torch.rand(n_groups, k, generator=draw) < 0.3


@needs_build
@levels
@pytest.mark.parametrize(("n_groups", "head_dim", "rank"), [(3, 64, 160), (1, 32, 32), (2, 80, 64), (2, 256, 96)])
@pytest.mark.parametrize("k", [0, 1, 8, 9, 53])
def test_as_the_reference(level, n_groups, head_dim, rank, k):
    factors, keys = make(n_groups, head_dim, rank)
    positions, exact = choice(n_groups, k)
    bases, rope = bases_of(factors, n_groups), rope_of(head_dim)
    assert bases is not None
    with level:
        found = low_rank_keys(factors, bases, positions, exact, keys, rope)
    wanted = low_rank_keys_reference(factors, positions, exact, keys, rope)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)
    groups, places = exact.nonzero(as_tuple=True)
    assert torch.equal(found[groups, places], keys[groups, positions[groups, places]])


@needs_build
def test_channels_that_do_not_rotate_and_groups_that_lie_apart():
    factors, keys = make(2, 64, 32)
    apart = torch.zeros(2, 200, 64, dtype=torch.bfloat16)[:, :80].copy_(keys)
    positions, exact = choice(2, 20)
    rope = rope_of(64, 0.5)
    found = low_rank_keys(factors, copy.deepcopy(bases_of(factors, 2)), positions, exact, apart, rope)
    wanted = low_rank_keys_reference(factors, positions, exact, keys, rope)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)


@needs_build
@pytest.mark.parametrize("wrong", [-1, N, 1 << 40])
def test_a_position_without_factors_is_refused(wrong):
    factors, keys = make(2, 64, 32)
    positions, exact = choice(2, 5)
    positions[1, 2] = wrong
    with pytest.raises(ValueError, match="outside"):
        low_rank_keys(factors, bases_of(factors, 2), positions, exact, keys, rope_of(64))


def test_sizes_that_the_kernel_does_not_take_are_left_to_the_reference():
    factors, keys = make(2, 24, 32)
    assert bases_of(factors, 2) is None
    positions, exact = choice(2, 5)
    found = low_rank_keys(factors, None, positions, exact, keys, rope_of(24))
    assert torch.equal(found, low_rank_keys_reference(factors, positions, exact, keys, rope_of(24)))
