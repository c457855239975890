"""RocketKV-MT chooses what plain loops choose, in every turn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rocketkv_loops import D, Session, expected

from sessiond.errors import InvalidConfig
from sessiond.policies.registry import parse
from sessiond.policies.rocketkv import RocketKV, Split

SMALL = RocketKV(budget=24, window=8, kernel=5, max_new=8)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("n_heads", "n_groups"), [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("kernel", [1, 5, 63])
def test_a_turn_chooses_as_the_loops_do(n_heads: int, n_groups: int, kernel: int) -> None:
    policy = RocketKV(budget=24, window=8, kernel=kernel, max_new=8)
    session = Session(policy, n_heads, n_groups)
    session.prompt(101, 120)
    for position in (120, 121, 122):
        assert session.step(position, 101) == expected(session, policy, 101, 120, position, 8)


def test_every_turn_chooses_anew_among_all_of_history() -> None:
    session = Session(SMALL)
    for turn_start, n, end in ((0, 60, 66), (66, 80, 83), (83, 140, 150), (150, 151, 160), (160, 163, 170)):
        session.prompt(turn_start, n)
        for position in range(n, end):
            chosen = session.step(position, turn_start)
            if turn_start and position < n + 3:
                assert chosen == expected(session, SMALL, turn_start, n, position, 8)


@pytest.mark.parametrize("cuts", [(110,), (119,), (102, 103, 118)])
def test_a_prompt_in_pieces_is_as_one(cuts: tuple[int, ...]) -> None:
    session = Session(SMALL)
    session.prompt(101, 120, *cuts)
    assert session.step(120, 101) == expected(session, SMALL, 101, 120, 120, 8)


def test_a_short_turn_borrows_the_queries_before_it() -> None:
    session = Session(SMALL)
    session.prompt(0, 100)
    for position in range(100, 104):
        session.step(position, 0)
    session.prompt(104, 106)
    # As if the last eight tokens of the text, [98, 106), had been the prompt: prompt, answer and new prompt.
    assert session.step(106, 104) == expected(session, SMALL, 104, 106, 106, 8)


@pytest.mark.parametrize(("carry", "window"), [(0, 2), (3, 5), (6, 8), (7, 8)])
def test_carry_limits_what_is_borrowed(carry: int, window: int) -> None:
    policy = RocketKV(budget=24, window=8, kernel=5, max_new=8, carry=carry)
    session = Session(policy)
    session.prompt(0, 104)
    session.prompt(104, 106)
    assert session.step(106, 104) == expected(session, policy, 104, 106, 106, window)


def test_nothing_is_borrowed_by_a_turn_as_long_as_the_window() -> None:
    session, alone = Session(SMALL), Session(SMALL)
    alone.query, alone.keys = session.query, session.keys
    session.prompt(0, 104)
    for one in (session, alone):
        one.prompt(104, 112)
    assert session.step(112, 104) == alone.step(112, 104)


def test_a_turn_resumed_in_its_middle_attends_to_all() -> None:
    session = Session(SMALL)
    assert session.step(120, 101) is None
    session.prompt(125, 130)
    assert session.step(130, 125) is not None
    assert session.step(140, 135) is None


def test_history_computed_again_is_no_prompt() -> None:
    session = Session(SMALL)
    assert session.selector.prompt(session.view(40, 100, 100)) is None  # type: ignore[func-returns-value]
    assert session.step(120, 100) is None


def test_all_take_part_while_history_fits_the_chosen_tokens() -> None:
    session = Session(SMALL)
    for turn_start, all_of_it in ((0, True), (12, True), (13, False)):
        session.prompt(turn_start, turn_start + 9)
        assert (session.step(turn_start + 9, turn_start) is None) == all_of_it
        session.selector.keep(0)


def test_own_tokens_given_back_leave_no_trace() -> None:
    session = Session(SMALL)
    session.prompt(101, 120)
    for position in range(120, 127):
        session.step(position, 101)
    session.selector.keep(122)
    session.keys[:, 122:] = torch.randn(3, 278, D)
    assert session.step(122, 101) == expected(session, SMALL, 101, 120, 122, 8)


def test_a_prompt_given_back_is_seen_again() -> None:
    session = Session(SMALL)
    session.prompt(60, 101)
    session.prompt(101, 120)
    session.step(120, 101)
    session.selector.keep(115)
    session.query[:, 115:] = torch.randn(9, 285, D)
    assert session.step(120, 101) is None
    session.selector.keep(101)
    session.prompt(101, 120)
    assert session.step(120, 101) == expected(session, SMALL, 101, 120, 120, 8)


@pytest.mark.parametrize("n", [50, 99, 101, 104])
def test_after_keep_nothing_of_what_is_gone_is_borrowed(n: int) -> None:
    session = Session(SMALL)
    session.prompt(0, 104)
    session.selector.keep(n)
    session.query[:, n:], session.keys[:, n:] = torch.randn(9, 400 - n, D), torch.randn(3, 400 - n, D)
    session.prompt(n, 106)
    assert session.step(106, n) == expected(session, SMALL, n, 106, 106, 8)


def test_a_fact_that_only_this_turn_asks_for_is_found() -> None:
    session = Session(RocketKV(budget=32, window=8, kernel=5, max_new=8), n=600)
    session.prompt(0, 500)
    session.step(500, 0)
    asked = torch.randn(3, D) * 3
    session.keys[:, 77] = asked
    session.query[:, 501:] = asked.repeat_interleave(3, 0)[:, None]
    session.prompt(501, 520)
    chosen = session.step(520, 501)
    assert chosen is not None
    assert all(77 in row for row in chosen)


def test_budgets_are_the_papers() -> None:
    policy = RocketKV(budget=512, max_new=256)
    # A ratio of 64: 10.3 for stage 1, 6.2 for stage 2, pages of 3 and half the channels.
    split = policy.split(64 * 512 - 256, 128)
    capacity = math.floor(64 * 512 / 64**0.56)
    assert split == Split(kept=capacity - 256, page=3, channels=128 * 3 * 512 // capacity, chosen=256)
    assert 64 * 512 / capacity == pytest.approx(10.3, abs=0.05)
    assert capacity / 512 == pytest.approx(6.2, abs=0.05)
    # No compression: all of the prompt is kept, scores are exact.
    assert policy.split(256, 64) == Split(kept=256, page=1, channels=64, chosen=256)
    # A long answer: room for it twice.
    assert RocketKV(budget=64, max_new=1000).split(3000, 64).kept == 1000


def test_budgets_grow_with_history() -> None:
    kept = [RocketKV().split(n, 64).kept for n in range(64, 64 * 512, 64)]
    assert kept == sorted(kept)
    assert kept[-1] > 2 * kept[2048 // 64]
    for n in range(1, 1 << 14, 61):
        for budget in (2, 64, 512):
            split = RocketKV(budget=budget).split(n, 64)
            assert 1 <= split.channels <= 64
            assert split.page >= 1
            assert split.kept >= 1


def test_sessions_share_nothing() -> None:
    one, other = Session(SMALL), Session(SMALL)
    for session in (one, other):
        session.prompt(101, 120)
    for session in (other, one):
        assert session.step(120, 101) == expected(session, SMALL, 101, 120, 120, 8)


def test_lower_precision_is_taken() -> None:
    session = Session(SMALL)
    session.query, session.keys = session.query.bfloat16(), session.keys.bfloat16()
    session.prompt(101, 120)
    chosen = session.step(120, 101)
    assert chosen is not None
    assert {len(row) for row in chosen} == {12}


def test_queries_without_size_choose_something() -> None:
    session = Session(SMALL)
    session.query = torch.zeros_like(session.query)
    session.prompt(101, 120)
    chosen = session.step(120, 101)
    assert chosen is not None
    assert {len(row) for row in chosen} == {12}


def test_knobs_round_trip() -> None:
    for policy in (RocketKV(), RocketKV(budget=2048, window=128, kernel=7, carry=0, max_new=1000)):
        assert parse("rocketkv", policy.knobs()) == policy
        assert policy.selector(0, 30) is not policy.selector(0, 30)
        assert policy.dense_prompt


@pytest.mark.parametrize(
    ("knob", "value", "allowed"),
    [
        ("budget", 1, "[2, 1048576]"),
        ("window", 0, "[1, 512]"),
        ("kernel", 0, "[1, 4095]"),
        ("carry", -1, "[0, 4096]"),
        ("max_new", 0, "[1, 1048576]"),
        ("max_new", "many", "[1, 1048576]"),
    ],
)
def test_bad_knobs_are_refused_with_their_range(knob: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse("rocketkv", {knob: value})
    assert caught.value.metadata == {"policy": "rocketkv", "knob": knob, "range": allowed}
