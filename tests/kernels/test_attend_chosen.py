"""Attention over chosen positions, against a loop over heads and queries."""

from __future__ import annotations

import pytest
import torch
from kernel_marks import needs_build

from sessiond.kernels.attention import Scratch, attend_chosen


def expected(query, keys, values, chosen, own, scaling):
    """[Q, H, D], one head and query at a time, fp64."""
    n_heads, n_new, _ = query.shape
    share = n_heads // keys.shape[0]
    out = torch.zeros(n_new, n_heads, query.shape[2], dtype=torch.float64)
    for head in range(n_heads):
        group = head // share
        for i in range(n_new):
            seen = [p for p in chosen[group].tolist() if p >= 0] + list(range(own.start, own.stop - n_new + i + 1))
            scores = keys[group, seen].double() @ query[head, i].double() * scaling
            out[i, head] = scores.softmax(0) @ values[group, seen].double()
    return out


CASES = [
    pytest.param(torch.float32, 10, 1e-5, id="fp32"),
    pytest.param(torch.bfloat16, 10, 0.03, id="bf16"),
    pytest.param(torch.bfloat16, 64, 0.03, id="kernel", marks=needs_build),
]


@pytest.mark.parametrize(("dtype", "head_dim", "tolerance"), CASES)
@pytest.mark.parametrize("n_new", [1, 5])
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_it_is_attention_over_those_positions_and_the_turns_own(dtype, head_dim, tolerance, n_new, ragged):
    draw = torch.Generator().manual_seed(7)
    query = torch.randn(6, n_new, head_dim, generator=draw).to(dtype)
    keys, values = (torch.randn(2, 128, head_dim, generator=draw).to(dtype) for _ in range(2))
    chosen = torch.stack([torch.randperm(90, generator=draw)[:21].sort().values for _ in range(2)])
    if ragged:
        chosen[1, 12:] = -1
    own = slice(95, 100 + n_new)
    scratch = Scratch()
    scratch.take("chosen values", 10_000, dtype).fill_(float("nan"))  # what was there before must not matter
    found = attend_chosen(query, keys, values, chosen, own, 0.3, scratch)
    assert found.shape == (n_new, 6, head_dim)
    wanted = expected(query, keys, values, chosen, own, 0.3)
    assert (found.double() - wanted).abs().max() < tolerance


def test_nothing_chosen_leaves_the_turns_own():
    query, keys, values = (torch.randn(n, t, 8) for n, t in ((4, 1), (2, 40), (2, 40)))
    chosen = torch.empty(2, 0, dtype=torch.int64)
    own = slice(30, 35)
    found = attend_chosen(query, keys, values, chosen, own, 0.3, Scratch())
    assert torch.allclose(found.double(), expected(query, keys, values, chosen, own, 0.3), atol=1e-5)
