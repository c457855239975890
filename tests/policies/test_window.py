"""The window: its first and its last tokens, no others."""

from __future__ import annotations

import pytest
import torch

from sessiond.errors import InvalidConfig, UnknownPolicy
from sessiond.policies.base import LayerView
from sessiond.policies.registry import parse


def view(turn_start: int, start: int, n_new: int) -> LayerView:
    total = start + n_new
    return LayerView(
        torch.zeros(6, n_new, 4), torch.zeros(2, total, 4), torch.zeros(2, total, 4), start, turn_start, 1.0
    )


def chosen(turn_start: int, start: int, n_new: int, **knobs: int) -> list[int]:
    rows = parse("window", knobs).selector(0, 1).step(view(turn_start, start, n_new)).tolist()
    assert rows[0] == rows[1]
    return rows[0]


def test_sinks_and_the_newest_of_history():
    assert chosen(100, 100, 1, sinks=2, recent=4) == [0, 1, 97, 98, 99]  # the new token is the fourth recent one


def test_the_turns_own_tokens_push_history_out():
    assert chosen(100, 103, 1, sinks=2, recent=4) == [0, 1]
    assert chosen(100, 200, 1, sinks=0, recent=4) == []


def test_no_query_of_a_piece_loses_a_recent_token():
    assert chosen(100, 100, 50, sinks=2, recent=4) == [0, 1, 97, 98, 99]


def test_a_short_history_is_whole():
    assert chosen(3, 3, 1, sinks=4, recent=8) == [0, 1, 2]
    assert chosen(0, 0, 5, sinks=4, recent=8) == []


def test_knobs_come_back_and_bad_ones_are_refused():
    policy = parse("window", {"sinks": 3.0, "recent": 9.0})
    assert parse("window", policy.knobs()) == policy
    assert policy.knobs() == {"sinks": 3, "recent": 9}
    for bad in ({"recent": 0}, {"sinks": -1}, {"recent": 1.5}, {"recent": True}, {"sinks": "2"}):
        with pytest.raises(InvalidConfig) as caught:
            parse("window", bad)
        assert caught.value.metadata["range"].startswith("[")
    with pytest.raises(UnknownPolicy):
        parse("window", {"width": 3})
    with pytest.raises(UnknownPolicy):
        parse("psychic", {})
