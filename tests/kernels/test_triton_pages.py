"""The Triton twin of page scores, against policies/pages.py."""

from __future__ import annotations

import pytest
from triton_cases import DEVICE, DTYPES, Draw, close

from sessiond.kernels.triton_pages import page_scores
from sessiond.policies.pages import Pages


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("own_signs", [True, False], ids=["own signs", "one for all"])
@pytest.mark.parametrize(("head_dim", "n_rows", "n_keys"), [(32, 1, 1), (64, 3, 15), (80, 8, 17), (128, 3, 1000)])
def test_they_are_the_references_scores(head_dim, n_rows, n_keys, own_signs, dtype, tolerance):
    draw = Draw()
    query = draw.normal(2, n_rows, head_dim, dtype=dtype)
    pages = Pages(4)
    pages.extend(draw.normal(2, n_keys, head_dim, dtype=dtype).cpu())
    rising = query > 0 if own_signs else query.sum(1, keepdim=True) > 0
    low, high = (bounds.to(DEVICE) for bounds in pages.bounds())
    found = page_scores(low, high, query, rising)
    # Bounds and queries are exact in fp32: only the order of the sums differs, of numbers about 20.
    assert close(found, pages.scores(query.cpu(), rising.cpu()), 1e-4)


def test_bounds_in_16_bits_serve_queries_in_32():
    draw = Draw()
    query = draw.normal(2, 3, 32)
    pages = Pages(4)
    pages.extend(draw.normal(2, 30, 32).bfloat16().cpu())
    low, high = (bounds.to(DEVICE) for bounds in pages.bounds())
    assert close(page_scores(low, high, query, query > 0), pages.scores(query.cpu(), query.cpu() > 0), 1e-4)


def test_what_does_not_fit_is_refused():
    draw = Draw()
    low, query = draw.normal(2, 5, 32), draw.normal(2, 3, 32)
    for wrong in (low[:, :4], low[..., :16], low.half(), low.mT.contiguous().mT):
        with pytest.raises(ValueError, match="pages"):
            page_scores(low, wrong, query, query > 0)
