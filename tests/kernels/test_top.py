"""The best k on every level of instructions are those of a stable sort."""

from __future__ import annotations

import pytest
import torch
from kernel_marks import levels, needs_build

from sessiond.kernels.top import top, top_reference


@needs_build
@levels
@pytest.mark.parametrize("n_values", [1, 2, 40, 1 << 20])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 1), (17, 16), (63, 31), (1000, 999), (5000, 512), (9001, 3)])
def test_top_is_a_stable_sorts_choice(level, n, k, n_values):
    torch.manual_seed(n + k)
    scores = torch.randint(-n_values, n_values, (3, n)).float() / 7
    scores[0, ::5] = float("-inf")
    scores[1, ::9] = float("inf")
    scores[2, ::3] = float("nan")
    scores[2, 1::2] *= 1e-40  # denormal, and zeros of both signs
    with level:
        assert torch.equal(top(scores, k), top_reference(scores, k))
    plain = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    wanted = plain.sort(stable=True, descending=True).indices[:, :k].sort().values
    assert torch.equal(top_reference(scores, k), wanted)


@needs_build
@levels
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0, 30.0])
def test_top_of_weights(level, spread):
    """Numbers of one sign and of few exponents, where all lie in one bin of the search, and of very many."""
    torch.manual_seed(3)
    scores = (torch.randn(3, 8192) * spread).softmax(-1)
    with level:
        for k in (1, 64, 512, 4096, 8191):
            assert torch.equal(top(scores, k), top_reference(scores, k))


@needs_build
@levels
def test_strided_rows(level):
    torch.manual_seed(4)
    wide = torch.randn(4, 300)
    with level:
        assert torch.equal(top(wide[::2, 5:100], 9), top_reference(wide[::2, 5:100].contiguous(), 9))
        assert torch.equal(top(wide.T, 2), top_reference(wide.T.contiguous(), 2))
