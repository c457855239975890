"""The Triton twin of scores of coded keys, a row each, against what the codes stand for, and the choice of them."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, DTYPES, Draw, close

from sessiond.kernels.triton_key_scores import coded_key_scores
from sessiond.policies.choosing import top
from sessiond.policies.quantized import Codes


class Index(Codes):
    """Rows of codes with one scale and low each."""

    def scores(self, query: torch.Tensor, n: int) -> torch.Tensor:
        return query.float() @ self.read(n, torch.float32).mT


def index_of(keys: torch.Tensor, bits: int) -> Index:
    index = Index(bits)
    index.extend(keys.cpu())
    return index


def scores_of(index: Index, bits: int, query: torch.Tensor, n: int) -> torch.Tensor:
    return coded_key_scores(index._codes.to(DEVICE), index._scales.to(DEVICE), bits, query, n)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("head_dim", "n_rows", "n"), [(32, 1, 1), (64, 3, 15), (80, 8, 17), (34, 3, 16), (128, 3, 1000), (32, 1, 0)]
)
def test_they_are_the_references_scores(head_dim, n_rows, n, bits, dtype, tolerance):
    draw = Draw()
    query = draw.normal(2, n_rows, head_dim, dtype=dtype)
    index = index_of(draw.normal(2, n + 5, head_dim), bits)
    # Codes are exact and the sums fp32 in any dtype of the query; codes of 8 bits add numbers about 2,000.
    assert close(scores_of(index, bits, query, n), index.scores(query.cpu(), n), 1e-3)


@pytest.mark.parametrize("bits", [2, 4])
def test_ties_are_chosen_from_as_the_reference_does(bits):
    """Small whole numbers sum the same in every order, and many keys are equal."""
    draw = Draw()
    query = draw.normal(2, 1, 32).round()
    keys = draw.normal(2, 5, 32).round()[:, torch.arange(200) % 5]
    index = index_of(keys, bits)
    # Scales and lows that are exact as well.
    index._scales.copy_(index._scales.float().round())
    found, wanted = scores_of(index, bits, query, 200)[:, 0], index.scores(query.cpu(), 200)[:, 0]
    assert torch.equal(found.cpu(), wanted)
    assert torch.equal(top(found, 50).cpu(), top(wanted, 50))
    assert top(found, 200).device == found.device


def test_what_does_not_fit_is_refused():
    draw = Draw()
    index = index_of(draw.normal(2, 20, 32), 4)
    codes, scales, query = index._codes.to(DEVICE), index._scales.to(DEVICE), draw.normal(2, 3, 32)
    for bits, wrong, n in ((2, codes, 20), (4, codes[:1], 20), (4, codes, 1000), (4, codes.mT, 16)):
        with pytest.raises(ValueError, match="codes"):
            coded_key_scores(wrong, scales, bits, query, n)
