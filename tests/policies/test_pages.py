"""Pages: summaries equal those made by loops, however the keys arrive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sessiond.policies.pages import Pages


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def plain_bounds(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    low, high = [], []
    for start in range(0, keys.shape[1], size):
        low.append(keys[:, start : start + size].amin(1))
        high.append(keys[:, start : start + size].amax(1))
    return torch.stack(low, 1), torch.stack(high, 1)


def assert_summarises(pages: Pages, keys: Tensor) -> None:
    assert pages.length == keys.shape[1]
    for found, expected in zip(pages.bounds(), plain_bounds(keys, pages.size), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1, 3, 4, 16, 100])
@pytest.mark.parametrize("pieces", [[63], [1] * 63, [5, 0, 7, 51], [4, 4, 4, 51], [62, 1]])
def test_pieces_give_the_summaries_of_the_whole(size: int, pieces: list[int]) -> None:
    keys = torch.randn(3, 63, 8)
    pages = Pages(size)
    start = 0
    for n in pieces:
        pages.extend(keys[:, start : start + n])
        start += n
        if start:
            assert_summarises(pages, keys[:, :start])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_summaries_keep_the_dtype_and_take_keys_that_are_not_contiguous(dtype: torch.dtype) -> None:
    keys = torch.randn(21, 3, 8).to(dtype).transpose(0, 1)
    pages = Pages(4)
    pages.extend(keys)
    assert_summarises(pages, keys)
    assert pages.bounds()[0].dtype == dtype


@pytest.mark.parametrize("n", [0, 1, 8, 9, 11, 12, 13])
def test_after_keep_the_cut_page_is_made_anew(n: int) -> None:
    keys = torch.randn(2, 13, 4)
    pages = Pages(4)
    pages.extend(keys)
    pages.keep(n)
    assert pages.length == (13 if n == 13 else n // 4 * 4)
    # What was beyond n is other now, and must leave no trace.
    changed = torch.cat([keys[:, :n], torch.randn(2, 19 - n, 4) * 0.01], 1)
    pages.extend(changed[:, pages.length :])
    assert_summarises(pages, changed)


def test_keep_beyond_the_end_changes_nothing() -> None:
    pages = Pages(4)
    pages.keep(7)
    assert (pages.length, pages.n_pages) == (0, 0)
    keys = torch.randn(1, 6, 2)
    pages.extend(keys)
    pages.keep(6)
    assert_summarises(pages, keys)


def test_cover_follows_its_end_up_and_down() -> None:
    keys = torch.randn(2, 40, 4)
    pages = Pages(4)
    for n in (3, 17, 17, 40, 22, 21, 24):
        pages.cover(keys, n)
        assert_summarises(pages, keys[:, :n])


def test_scores_are_bounds_of_every_key_and_equal_the_loops() -> None:
    query, keys = torch.randn(3, 2, 8), torch.randn(3, 30, 8)
    pages = Pages(4)
    pages.extend(keys)
    scores = pages.scores(query, query > 0)
    low, high = plain_bounds(keys, 4)
    for group in range(3):
        for head in range(2):
            for page in range(8):
                q = query[group, head]
                expected = torch.maximum(q * low[group, page], q * high[group, page]).sum()
                assert torch.isclose(scores[group, head, page], expected, atol=1e-5)
                true = keys[group, page * 4 : page * 4 + 4] @ q
                assert (true <= scores[group, head, page] + 1e-5).all()


def test_scores_may_take_their_signs_from_elsewhere() -> None:
    query, rising = torch.randn(2, 3, 8), torch.rand(2, 1, 8) > 0.5
    keys = torch.randn(2, 11, 8)
    pages = Pages(3)
    pages.extend(keys)
    low, high = plain_bounds(keys, 3)
    expected = torch.einsum("grd,gpd->grp", query, torch.where(rising, high, low))
    torch.testing.assert_close(pages.scores(query, rising), expected)
