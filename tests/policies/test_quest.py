"""Quest chooses the pages that a plain loop chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sessiond.errors import InvalidConfig
from sessiond.policies.base import LayerView, Selector
from sessiond.policies.quest import Quest
from sessiond.policies.registry import parse

D = 8


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_view(keys: Tensor, turn_start: int, query: Tensor) -> LayerView:
    n = keys.shape[1]
    return LayerView(query, keys, torch.zeros_like(keys), n - query.shape[1], turn_start, D**-0.5)


def selector(policy: Quest) -> Selector:
    made = policy.selector(policy.dense_layers, 30)
    assert made is not None
    return made


def plain_choice(view: LayerView, page: int, n_chosen: int) -> list[list[int]]:
    """Positions by group, from loops over heads, pages and channels."""
    chosen = []
    n_heads = view.query.shape[0] // view.keys.shape[0]
    for group in range(view.keys.shape[0]):
        bounds = []
        for start in range(0, view.turn_start, page):
            keys = view.keys[group, start : min(start + page, view.turn_start)]
            heads = view.query[group * n_heads : (group + 1) * n_heads, 0]
            bounds.append(max(float((q * keys).amax(0).sum()) for q in heads))
        best = sorted(sorted(range(len(bounds)), key=lambda i: -bounds[i])[:n_chosen])
        chosen.append([p for i in best for p in range(i * page, i * page + page) if p < view.turn_start])
    return chosen


def rows(positions: Tensor | None) -> list[list[int]]:
    """The positions by group, once they are seen to be ascending and padded at their end only."""
    assert positions is not None
    assert positions.dtype == torch.int64
    found = []
    for row in positions.tolist():
        real = [p for p in row if p >= 0]
        assert row == real + [-1] * (len(row) - len(real))
        assert real == sorted(set(real))
        found.append(real)
    return found


@pytest.mark.parametrize(("n_heads", "n_groups"), [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("turn_start", [40, 41, 63])
@pytest.mark.parametrize("page", [1, 4, 5])
def test_step_chooses_as_the_loops_do(n_heads: int, n_groups: int, turn_start: int, page: int) -> None:
    policy = Quest(page=page, budget=20)
    view = make_view(torch.randn(n_groups, 70, D), turn_start, torch.randn(n_heads, 1, D))
    assert rows(selector(policy).step(view)) == plain_choice(view, page, 20 // page)


def test_a_page_cut_by_the_turn_is_padded() -> None:
    keys = torch.zeros(2, 30, D)
    keys[0, 21] = 5  # group 0 wants the cut page [20, 24), group 1 the first
    keys[1, 0] = 5
    keys[:, 22:] = 100  # the turn's own: not seen
    chosen = selector(Quest(page=4, budget=4)).step(make_view(keys, 22, torch.ones(2, 1, D)))
    assert chosen is not None
    assert chosen.tolist() == [[20, 21, -1, -1], [0, 1, 2, 3]]


def test_all_take_part_while_history_fits_the_budget() -> None:
    quest = selector(Quest(page=4, budget=20))
    keys, query = torch.randn(3, 40, D), torch.randn(9, 1, D)
    assert quest.step(make_view(keys, 0, query)) is None
    assert quest.step(make_view(keys, 20, query)) is None
    assert quest.step(make_view(keys, 21, query)) is not None


def test_prompts_and_first_layers_are_dense() -> None:
    policy = Quest()
    assert policy.dense_prompt
    assert [policy.selector(layer, 30) is None for layer in range(4)] == [True, True, False, False]
    assert selector(policy).prompt(make_view(torch.randn(3, 900, D), 800, torch.randn(9, 100, D))) is None


def test_a_selector_that_followed_the_session_chooses_as_a_new_one() -> None:
    policy = Quest(page=4, budget=12)
    followed = selector(policy)
    keys = torch.randn(3, 90, D)
    for turn_start in (14, 15, 39, 70):
        for n in (turn_start + 3, turn_start + 4):
            view = make_view(keys[:, :n], turn_start, torch.randn(9, 1, D))
            assert rows(followed.step(view)) == rows(selector(policy).step(view))


@pytest.mark.parametrize("n", [0, 3, 16, 17, 38])
def test_keep_forgets_keys_that_changed(n: int) -> None:
    policy = Quest(page=4, budget=12)
    followed = selector(policy)
    keys = torch.randn(3, 50, D)
    followed.step(make_view(keys, 39, torch.randn(9, 1, D)))
    keys[:, n:] = torch.randn(3, 50 - n, D) / 10
    followed.keep(n)
    view = make_view(keys, 37, torch.randn(9, 1, D))
    assert rows(followed.step(view)) == plain_choice(view, 4, 3)


def test_the_key_of_the_largest_product_is_always_chosen() -> None:
    """The bound is an upper bound: the best key of any head lies in one of the best pages, if few pages compete."""
    keys, query = torch.randn(1, 64, D) / 100, torch.randn(3, 1, D)
    keys[0, 37] = query[1, 0] * 9
    chosen = rows(selector(Quest(page=4, budget=4)).step(make_view(keys, 60, query)))
    assert 37 in chosen[0]


def test_knobs_round_trip() -> None:
    for policy in (Quest(), Quest(page=16, budget=2048, dense_layers=0)):
        assert parse("quest", policy.knobs()) == policy
    assert parse("quest", {"page": 8.0}) == Quest(page=8)


@pytest.mark.parametrize(
    ("knobs", "knob", "allowed"),
    [
        ({"page": 0}, "page", "[1, 1024]"),
        ({"page": 4.5}, "page", "[1, 1024]"),
        ({"page": 16, "budget": 8}, "budget", "[16, 1048576]"),
        ({"dense_layers": -1}, "dense_layers", "[0, 1024]"),
        ({"dense_layers": True}, "dense_layers", "[0, 1024]"),
    ],
)
def test_bad_knobs_are_refused_with_their_range(knobs: dict[str, Any], knob: str, allowed: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse("quest", knobs)
    assert caught.value.metadata == {"policy": "quest", "knob": knob, "range": allowed}
