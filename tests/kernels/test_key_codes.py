"""Codes of keys: packed to the reference's bytes, scored to the reference's numbers, on every level of instructions."""

from __future__ import annotations

import pytest
import torch
from kernel_marks import levels, needs_build

from sessiond.kernels.key_codes import TILE, pack, pack_reference, scores, scores_reference, tile_bytes

SHAPES = [(1, 1, 32, 1), (3, 3, 64, 100), (2, 4, 64, 64), (3, 5, 80, 33), (2, 1, 256, 17), (2, 7, 33, 200)]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 2 + 0.5).to(dtype)


def empty(n_groups: int, n: int, head_dim: int, bits: int) -> torch.Tensor:
    return torch.zeros(n_groups, -(-n // TILE), tile_bytes(head_dim, bits), dtype=torch.uint8)


@needs_build
@levels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("n_groups", "n_share", "head_dim", "n"), SHAPES)
def test_packed_and_scored_as_the_reference_does(level, n_groups, n_share, head_dim, n, bits, dtype):
    keys, query = draw(n_groups, n + 3, head_dim, dtype=dtype)[:, 3:], draw(n_groups, n_share, head_dim, dtype=dtype)
    tiles, wanted = empty(n_groups, n, head_dim, bits), empty(n_groups, n, head_dim, bits)
    cut = n // 3
    with level:
        pack(keys[:, :cut], tiles, 0, bits)
        for i in range(cut, n):
            pack(keys[:, i : i + 1], tiles, i, bits)
        found = scores(query, tiles, n, bits)
    pack_reference(keys, wanted, 0, bits)
    assert torch.equal(tiles, wanted)
    exact = scores_reference(query.double().float(), wanted, n, bits)
    assert found.shape == (n_groups, n_share, n)
    assert (found - exact).abs().max() <= 2e-6 * query.float().abs().sum(-1).max() * keys.float().abs().max()


@needs_build
@levels
def test_a_key_scores_the_same_wherever_its_tile_stands(level):
    keys, query = draw(1, 16, 64, dtype=torch.bfloat16), draw(1, 5, 64, dtype=torch.bfloat16)
    tiles = empty(1, 16 * 9, 64, 4)
    with level:
        pack(keys.repeat(1, 9, 1), tiles, 0, 4)
        found = scores(query, tiles, 144, 4).view(5, 9, 16)
    assert torch.equal(found, found[:, :1].expand_as(found))


@needs_build
@levels
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
def test_keys_and_queries_that_are_no_numbers_reach_the_scores_and_no_others(level, strange):
    keys, query = draw(1, 40, 64), draw(1, 2, 64)
    keys[0, 7, 3] = strange
    tiles = empty(1, 40, 64, 4)
    with level:
        pack(keys, tiles, 0, 4)
        found = scores(query, tiles, 40, 4)
    assert not found[..., 7].isfinite().any()
    assert found[..., :7].isfinite().all()
    assert found[..., 8:].isfinite().all()
    query[0, 1, 0] = strange
    with level:
        found = scores(query, tiles, 40, 4)
    assert found[0, 0, 8:].isfinite().all()
    assert not found[0, 1].isfinite().any()


def test_tiles_that_do_not_hold_the_keys_are_refused():
    tiles, query = empty(2, 16, 64, 4), draw(2, 3, 64)
    for bad in (tiles[:1], tiles[..., :-1], tiles.int()):
        with pytest.raises(ValueError, match="tiles of shape"):
            scores(query, bad, 16, 4)
    for n, bits in ((17, 4), (16, 2), (16, 3)):
        with pytest.raises(ValueError, match="tiles of shape"):
            scores(query, tiles, n, bits)
    with pytest.raises(ValueError, match="tiles of shape"):
        pack(draw(2, 2, 64), tiles, 15, 4)
