"""Sieve's step against its reference: random layers, and the awkward ones."""

from __future__ import annotations

import pytest
import torch
from kernel_marks import levels, needs_build
from torch import Tensor

from sessiond.kernels.heaviest import Enough, heaviest, heaviest_reference
from sessiond.kernels.key_codes import TILE, pack, scores_reference, tile_bytes

SCALING = 0.125


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(keys: Tensor, bits: int = 4) -> Tensor:
    n_groups, n, head_dim = keys.shape
    tiles = torch.zeros(n_groups, -(-n // TILE), tile_bytes(head_dim, bits), dtype=torch.uint8)
    pack(keys, tiles, 0, bits)
    return tiles


def weights_of(query: Tensor, tiles: Tensor, n: int, bits: int = 4) -> Tensor:
    return (scores_reference(query, tiles, n, bits) * SCALING).softmax(-1).mean(1)


def assert_same_choice(found: Tensor, wanted: Tensor, weights: Tensor) -> None:
    """The same positions, or others that weigh the same but for the rounding of sums."""
    assert found.dtype == torch.int64
    assert found.shape == wanted.shape
    for group in range(len(found)):
        assert found[group].tolist() == sorted(set(found[group].tolist()))
        other = sorted(set(found[group].tolist()) ^ set(wanted[group].tolist()))
        differing = weights[group, other]
        assert len(other) == 0 or differing.max() <= differing.min() * (1 + 1e-4) + 1e-30


@needs_build
@levels
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    ("n_groups", "n_share", "head_dim", "n", "own"),
    [(3, 3, 64, 3000, 40), (1, 1, 32, 700, 0), (2, 5, 64, 1025, 1), (2, 4, 80, 600, 599), (3, 3, 64, 5000, 2)],
)
def test_the_choice_is_the_references(level, n_groups, n_share, head_dim, n, own, mass, prior):
    keys = draw(n_groups, n, head_dim, seed=1) + 2 * draw(n_groups, 1, head_dim, seed=2)
    query = (draw(n_groups, n_share, head_dim, seed=3) * 2).bfloat16()
    known = torch.rand(n_groups, n // 2, generator=torch.Generator().manual_seed(4)).half() if prior else None
    tiles, enough = packed(keys), Enough(mass, 16, 300)
    wanted = heaviest_reference(query, tiles, n, n - own, 4, SCALING, enough, known)
    with level:
        found = heaviest(query, tiles, n, n - own, 4, SCALING, enough, known)
    assert_same_choice(found, wanted, weights_of(query, tiles, n))


@needs_build
@levels
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keys_that_repeat_are_taken_from_the_first_on(level, bits):
    """Of equal keys the weights are equal to the bit, so the choice is the reference's to the position."""
    keys = draw(2, 60, 64, seed=5).repeat(1, 40, 1)
    query, tiles, enough = draw(2, 3, 64, seed=6) * 4, packed(keys, bits), Enough(0.9999, 1, 500)
    wanted = heaviest_reference(query, tiles, 2400, 2390, bits, SCALING, enough, None)
    with level:
        assert torch.equal(heaviest(query, tiles, 2400, 2390, bits, SCALING, enough, None), wanted)


@needs_build
@levels
@pytest.mark.parametrize("n_earlier", [0, 1, 15, 16, 17, 63, 64])
@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 16), (5, 17), (64, 512)])
def test_few_tokens(level, n_earlier, least, most):
    keys, query = draw(2, n_earlier + 1, 32, seed=7), draw(2, 3, 32, seed=8)
    tiles, enough = packed(keys), Enough(0.9, least, most)
    wanted = heaviest_reference(query, tiles, n_earlier + 1, n_earlier, 4, SCALING, enough, None)
    with level:
        found = heaviest(query, tiles, n_earlier + 1, n_earlier, 4, SCALING, enough, None)
    assert torch.equal(found, wanted)


@needs_build
@levels
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf"), 1e30, 0.0])
def test_queries_and_keys_without_sense_are_still_a_choice(level, strange):
    keys, query = draw(2, 900, 64, seed=9), draw(2, 3, 64, seed=10)
    query[1, 0, 5] = strange
    tiles, enough = packed(keys), Enough(0.9, 32, 128)
    wanted = heaviest_reference(query, tiles, 900, 890, 4, SCALING, enough, None)
    with level:
        found = heaviest(query, tiles, 900, 890, 4, SCALING, enough, None)
    assert_same_choice(found, wanted, weights_of(query, tiles, 900).nan_to_num())
    keys[0, 400, 3] = strange
    tiles = packed(keys)
    wanted = heaviest_reference(query, tiles, 900, 890, 4, SCALING, enough, None)
    with level:
        found = heaviest(query, tiles, 900, 890, 4, SCALING, enough, None)
    assert_same_choice(found, wanted, weights_of(query, tiles, 900).nan_to_num())


@needs_build
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_choice(threads):
    keys, query, enough = draw(3, 5000, 64, seed=11), draw(3, 3, 64, seed=12) * 3, Enough(0.97, 1, 4000)
    tiles, before = packed(keys), torch.get_num_threads()
    wanted = heaviest(query, tiles, 5000, 4990, 4, SCALING, enough, None)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(heaviest(query, tiles, 5000, 4990, 4, SCALING, enough, None), wanted)
    finally:
        torch.set_num_threads(before)


def test_what_a_kernel_would_read_beyond_is_refused():
    keys, query = draw(2, 32, 64), draw(2, 3, 64)
    tiles = packed(keys)
    for n, n_earlier, enough in ((33, 1, Enough(1, 1, 1)), (32, 33, Enough(1, 1, 1)), (32, 3, Enough(1, 2, 1))):
        with pytest.raises(ValueError, match="of"):
            heaviest(query, tiles, n, n_earlier, 4, SCALING, enough, None)
