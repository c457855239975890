"""The best k are those of a stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sessiond.policies.choosing import top


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def plain_top(scores: Tensor, k: int) -> list[list[int]]:
    return [sorted(sorted(range(len(row)), key=lambda i: -row[i])[:k]) for row in scores.tolist()]


@pytest.mark.parametrize("k", [0, 1, 2, 31, 62, 63, 64])
@pytest.mark.parametrize("n_values", [1, 2, 5, 1000])
def test_top_is_a_stable_sorts_choice(k: int, n_values: int) -> None:
    scores = torch.randint(n_values, (3, 63)).float()
    scores[1, ::3] = float("-inf")
    scores[2, ::9] = float("inf")
    assert top(scores, k).tolist() == plain_top(scores, k)


def test_top_of_whole_rows_without_sense_is_still_a_choice() -> None:
    scores = torch.full((2, 9), float("nan"))
    scores[0, 4] = -1
    assert top(scores, 2).tolist() == [[0, 4], [0, 1]]


def test_all_are_chosen_where_there_are_no_more() -> None:
    assert top(torch.randn(3, 5), 5).tolist() == [[0, 1, 2, 3, 4]] * 3
