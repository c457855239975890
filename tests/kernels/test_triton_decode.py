"""The Triton twin of attention of few tokens, against the reference in torch."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, DTYPES, Draw, close

from sessiond.kernels.attention import Scratch, attend_reference
from sessiond.kernels.triton_decode import attend_few, attend_few_batch
from sessiond.kernels.triton_parts import SPLIT

pytestmark = pytest.mark.usefixtures("unwritten_shows")

# head_dim, heads of a group, new tokens, all tokens, window
SHAPES = [
    (32, 1, 1, 1, None),
    (32, 3, 1, 15, None),
    (64, 1, 1, 16, None),
    (64, 8, 1, 17, None),
    (80, 3, 1, 1000, None),
    (128, 3, 1, 300, None),
    (80, 3, 3, 17, None),
    (32, 8, 9, SPLIT + 1, None),
    (64, 3, 1, 1000, 1),
    (64, 3, 1, 1000, 300),
    (32, 3, 5, 1000, 16),
    (32, 1, 2, 17, 1000),
]


def expected(query, keys, values, position, window, scaling):
    """What the reference computes in fp32: [Q, H, D]."""
    n_new = query.shape[1]
    tokens = torch.arange(position + n_new)
    own = torch.arange(position, position + n_new)[:, None]
    hidden = tokens > own
    if window:
        hidden |= tokens <= own - window
    query, keys, values = (part.float().cpu() for part in (query, keys, values))
    return attend_reference(query, keys, values, 0, 0, hidden, scaling, Scratch())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("head_dim", "share", "n_new", "n", "window"), SHAPES)
def test_it_is_the_references_attention(head_dim, share, n_new, n, window, dtype, tolerance):
    draw = Draw()
    query = draw.normal(2 * share, n_new, head_dim, dtype=dtype)
    keys, values = draw.cached(2, n, head_dim, dtype), draw.cached(2, n, head_dim, dtype)
    found = attend_few(query, keys, values, n - n_new, window, 0.2, None)
    assert found.dtype is dtype
    assert close(found, expected(query, keys, values, n - n_new, window, 0.2), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("window", [None, 40])
def test_a_session_comes_out_the_same_to_the_bit_beside_any_others(window, dtype, tolerance):
    draw = Draw()
    lengths = [1, 600, 17, SPLIT]
    query = draw.normal(len(lengths), 6, 1, 32, dtype=dtype)
    keys, values = ([draw.cached(2, n, 32, dtype) for n in lengths] for _ in range(2))
    positions = [n - 1 for n in lengths]
    found = attend_few_batch(query, keys, values, positions, window, 0.3)
    for b, position in enumerate(positions):
        assert torch.equal(found[b], attend_few(query[b], keys[b], values[b], position, window, 0.3, None))
        assert close(found[b], expected(query[b], keys[b], values[b], position, window, 0.3), tolerance)


def test_more_rows_than_a_tile_and_a_query_that_is_a_view():
    draw = Draw()
    query = draw.normal(12, 16, 32).transpose(0, 1)  # [H 16, Q 12, D], 96 rows a group
    keys, values = draw.cached(2, 70, 32, torch.float32), draw.cached(2, 70, 32, torch.float32)
    found = attend_few(query, keys, values, 58, None, 0.2, None)
    assert close(found, expected(query, keys, values, 58, None, 0.2), 1e-5)


def test_large_scores_do_not_overflow():
    query = torch.full((1, 1, 32), 1e4, device=DEVICE)
    keys, values = Draw().cached(1, 300, 32, torch.float32), Draw(6).cached(1, 300, 32, torch.float32)
    found = attend_few(query, keys, values, 299, None, 1.0, None)
    assert close(found[0], values[:, keys[0].sum(-1).argmax()], 1e-5)


def test_what_does_not_fit_is_refused():
    draw = Draw()
    query, keys = draw.normal(6, 1, 32), draw.normal(2, 20, 32)
    for wrong in (keys[:, :9], keys[..., :16], keys.half(), keys.transpose(0, 1).contiguous().transpose(0, 1)):
        with pytest.raises(ValueError, match="keys"):
            attend_few(query, keys, wrong, 10, None, 1.0, None)
    with pytest.raises(ValueError, match="sessions"):
        attend_few_batch(query[None].expand(2, -1, -1, -1), [keys], [keys], [10], None, 1.0)
