"""Bounds of pages: made in any pieces, scored as the reference does, on every level of instructions."""

from __future__ import annotations

import pytest
import torch
from kernel_marks import levels, needs_build

from sessiond.kernels.page_bounds import best_scores, extend, extend_reference, positions_of, scores, scores_reference
from sessiond.kernels.rocket import PagedSet, choose, choose_reference

KINDS = [torch.bfloat16, torch.float32]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def bounds_of(keys: torch.Tensor, size: int, extra: int = 3) -> torch.Tensor:
    n_groups, n, head_dim = keys.shape
    bounds = torch.full((2, n_groups, -(-n // size) + extra, head_dim), torch.nan).to(keys.dtype)
    extend_reference(keys, bounds, 0, size)
    return bounds


@needs_build
@levels
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_bounds_are_those_of_the_keys_in_any_pieces(level, size, dtype):
    keys = draw(2, 75, 40, dtype=dtype)
    keys[0, 50, 7] = torch.nan
    bounds = torch.empty(2, 2, 80, 40, dtype=dtype)
    with level:
        for start, end in ((0, 1), (1, 2), (2, 30), (30, 30), (30, 75)):
            extend(keys[:, start:end], bounds, start, size)
    n_pages = -(-75 // size)
    for page in range(n_pages):
        part = keys[:, page * size : (page + 1) * size]
        assert torch.equal(bounds[0, :, page].nan_to_num(9), part.amin(1).nan_to_num(9))
        assert torch.equal(bounds[1, :, page].nan_to_num(9), part.amax(1).nan_to_num(9))
    assert bool(bounds[0, 0, 50 // size, 7].isnan())


@needs_build
@levels
@pytest.mark.parametrize("query_dtype", KINDS)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("n_groups", "n_share", "head_dim", "n_pages"),
    [(3, 3, 64, 700), (1, 1, 32, 1), (2, 5, 80, 17), (2, 2, 33, 515), (1, 4, 256, 40)],
)
def test_scores_are_the_references(level, n_groups, n_share, head_dim, n_pages, dtype, query_dtype):
    bounds = bounds_of(draw(n_groups, n_pages * 2, head_dim, dtype=dtype), 2)
    query = draw(n_groups, n_share, head_dim, seed=1, dtype=query_dtype)
    near = {"atol": 3e-6 * head_dim * float(bounds[:, :, :n_pages].float().abs().max()), "rtol": 0}
    with level:
        for rows in (1, n_share):
            rising = draw(n_groups, rows, head_dim, seed=2) > 0
            wanted = scores_reference(query, bounds, n_pages, rising)
            torch.testing.assert_close(scores(query, bounds, n_pages, rising), wanted, **near)
        wanted = scores_reference(query, bounds, n_pages)
        torch.testing.assert_close(scores(query, bounds, n_pages), wanted, **near)
        torch.testing.assert_close(best_scores(query, bounds, n_pages), wanted.amax(1), **near)


@needs_build
@levels
def test_a_page_that_is_no_number_is_seen_by_every_head_and_touches_no_other(level):
    keys, query = draw(1, 60, 64, dtype=torch.bfloat16), draw(1, 3, 64, seed=1, dtype=torch.bfloat16)
    keys[0, 21] = torch.nan
    with level:
        found = best_scores(query, bounds_of(keys, 3), 20)
    assert found[0].isnan().tolist() == [page == 7 for page in range(20)]


def test_positions_of_pages_end_where_the_tokens_do():
    assert positions_of(torch.tensor([[0, 2], [1, 3]]), 3, 10).tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, -1, -1],
    ]


def test_bounds_that_do_not_fit_are_refused():
    keys, query = draw(2, 9, 64), draw(2, 3, 64)
    bounds = bounds_of(keys, 3, extra=0)
    with pytest.raises(ValueError, match="bounds of shape"):
        extend(keys[:, :1], bounds, 9, 3)
    with pytest.raises(ValueError, match="bounds of shape"):
        extend(keys.bfloat16(), bounds, 0, 3)
    for bad, n_pages in ((bounds, 4), (bounds[:, :1], 3), (bounds[..., :32].contiguous(), 3)):
        with pytest.raises(ValueError, match="bounds of shape"):
            scores(query, bad, n_pages)
    with pytest.raises(ValueError, match="rising of shape"):
        scores(query, bounds, 3, torch.ones(2, 2, 64, dtype=torch.bool))


@needs_build
@levels
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("n_share", "head_dim", "size", "n_tokens", "n_set", "n_channels", "n_chosen"),
    [(3, 64, 3, 2300, 2186, 40, 256), (1, 32, 1, 400, 400, 32, 17), (5, 80, 4, 101, 97, 1, 96), (2, 64, 8, 9, 9, 7, 9)],
)
def test_stage_two_chooses_as_its_reference(
    level, n_share, head_dim, size, n_tokens, n_set, n_channels, n_chosen, dtype
):
    keys = draw(3, n_tokens, head_dim, dtype=dtype)
    query = draw(3, n_share, head_dim, seed=5, dtype=dtype)
    among = PagedSet(bounds_of(keys, size), size, n_tokens, n_set)
    wanted = choose_reference(query, among, n_channels, n_chosen, 0.125)
    with level:
        found = choose(query, among, n_channels, n_chosen, 0.125)
    assert found.shape == wanted.shape
    differing = sum(len(set(a.tolist()) ^ set(b.tolist())) for a, b in zip(found, wanted, strict=True))
    assert differing <= 2  # one page of the last, where sums round otherwise
    assert torch.equal(found, found.sort(-1).values)


@needs_build
@levels
def test_stage_two_of_queries_without_sense_is_still_a_choice(level):
    among = PagedSet(bounds_of(draw(2, 90, 64), 3), 3, 90, 80)
    for strange in (0.0, torch.nan, torch.inf):
        query = draw(2, 3, 64)
        query[:] = strange
        with level:
            assert choose(query, among, 20, 5, 0.125).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_more_than_there_is_is_refused():
    among = PagedSet(bounds_of(draw(2, 90, 64), 3), 3, 90, 80)
    for channels, chosen in ((0, 5), (65, 5), (5, 0), (5, 81)):
        with pytest.raises(ValueError, match="tokens"):
            choose(draw(2, 3, 64), among, channels, chosen, 0.125)
