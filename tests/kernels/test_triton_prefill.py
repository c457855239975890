"""The Triton twin of a cell's attention, against the reference in torch."""

from __future__ import annotations

import pytest
import torch
from test_triton_decode import expected
from triton_cases import DTYPES, Draw, close

from sessiond.kernels.triton_prefill import attend_prefill

pytestmark = pytest.mark.usefixtures("unwritten_shows")

# head_dim, heads of a group, new tokens, tokens before, window
SHAPES = [
    (32, 1, 1, 0, None),
    (32, 3, 15, 0, None),
    (64, 1, 16, 100, None),
    (80, 3, 17, 0, None),
    (128, 1, 66, 70, None),
    (32, 8, 65, 63, None),
    (32, 1, 70, 0, 1),
    (64, 3, 70, 64, 16),
    (32, 1, 130, 300, 100),
    (32, 1, 17, 1000, 64),
    (32, 1, 100, 20, 1000),
]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("head_dim", "share", "n_new", "before", "window"), SHAPES)
def test_it_is_the_references_attention(head_dim, share, n_new, before, window, dtype, tolerance):
    draw = Draw()
    n = before + n_new
    query = draw.normal(2 * share, n_new, head_dim, dtype=dtype)
    keys, values = draw.cached(2, n, head_dim, dtype), draw.cached(2, n, head_dim, dtype)
    found = attend_prefill(query, keys, values, before, window, 0.2)
    assert found.dtype is dtype
    assert close(found, expected(query, keys, values, before, window, 0.2), tolerance)


def test_what_does_not_fit_is_refused():
    draw = Draw()
    query, keys = draw.normal(6, 4, 32), draw.normal(2, 20, 32)
    for wrong in (keys[:, :9], keys[..., :16], keys.half(), keys.mT.contiguous().mT):
        with pytest.raises(ValueError, match="keys"):
            attend_prefill(query, keys, wrong, 10, None, 1.0)
    with pytest.raises(ValueError, match="keys"):
        attend_prefill(query, keys, keys, 17, None, 1.0)
    with pytest.raises(ValueError, match="keys"):
        attend_prefill(torch.cat([query, query[:1]]), keys, keys, 10, None, 1.0)
