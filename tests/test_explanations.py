"""What is remembered of turns is bounded: by session, by turns, by bytes; the oldest go first."""

from __future__ import annotations

import numpy as np
import pytest

from sessiond import explanations as module
from sessiond import wireexplain
from sessiond.explanations import Explanation, Explanations, LayerRead


def turn(request_id: str, n_reads: int = 1, revision_id: str = "") -> Explanation:
    spans = np.zeros((64, 2), np.uint32) + (1 << 30)
    reads = tuple(LayerRead(layer, 0, 1, 9, 9, 9.0, spans, True, (), None) for layer in range(n_reads))
    return Explanation(revision_id, request_id, "full", {}, 10, 1, reads, None, {"decode": 1.0}, (), 0)


def names(memory: Explanations, session: str) -> list[str]:
    return [one.request_id for one in memory.last("a", session)]


def test_a_session_keeps_its_last_turns_newest_first():
    memory = Explanations()
    for i in range(20):
        memory.remember("a", "s", turn(f"r{i}"))
    assert names(memory, "s") == [f"r{i}" for i in range(19, 3, -1)]
    assert len(memory) == module.MOST_OF_A_SESSION == 16


@pytest.mark.parametrize("bound", ["MOST_TURNS", "MOST_BYTES"])
def test_the_turns_of_the_session_longest_without_one_go_first(bound: str, monkeypatch):
    monkeypatch.setattr(module, bound, 4 * (1 if bound == "MOST_TURNS" else turn("x").nbytes))
    memory = Explanations()
    for session, name in [("s", "r0"), ("t", "r1"), ("t", "r2"), ("s", "r3"), ("u", "r4"), ("u", "r5")]:
        memory.remember("a", session, turn(name))
    assert [names(memory, session) for session in "stu"] == [["r3", "r0"], [], ["r5", "r4"]]
    memory.remember("a", "v", turn("r6"))
    assert names(memory, "s") == ["r3"]
    assert len(memory) == 4


def test_one_turn_that_is_too_large_for_all_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 1)
    memory = Explanations()
    memory.remember("a", "s", turn("r"))
    assert (len(memory), memory.last("a", "s")) == (0, [])
    monkeypatch.undo()
    memory.remember("a", "s", turn("r"))
    assert len(memory) == 1


def test_the_same_request_again_replaces_what_was_told_of_it():
    memory = Explanations()
    memory.remember("a", "s", turn("r"))
    memory.remember("a", "s", turn("r", revision_id="v"))
    assert [one.revision_id for one in memory.last("a", "s")] == ["v"]


def test_tenants_are_apart():
    memory = Explanations()
    memory.remember("a", "s", turn("r"))
    assert memory.last("b", "s") == []
    memory.forget("b", "s")
    assert names(memory, "s") == ["r"]


def test_a_reply_holds_what_fits_in_a_message_and_one_turn_at_least(monkeypatch):
    turns = [turn(f"r{i}", n_reads=400) for i in range(16)]
    reply = wireexplain.response(turns)
    assert 1 < len(reply.turns) < 16
    assert reply.ByteSize() <= wireexplain.MOST_BYTES < 4 << 20
    monkeypatch.setattr(wireexplain, "MOST_BYTES", 1)
    assert [one.request_id for one in wireexplain.response(turns).turns] == ["r0"]
