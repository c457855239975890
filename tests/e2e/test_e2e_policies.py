"""Policies through the daemon: set, overridden for a turn, changed at any time; nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
from e2e_daemon import Daemons, Peer, peer_of, refused
from google.protobuf.json_format import MessageToDict
from grpc import StatusCode
from small_policies import SMALL

from sessiond.policies.registry import POLICIES, parse
from sessiond.policies.window import WindowSelector
from sessiond.v1 import admin_pb2
from sessiond.v1 import sessions_pb2 as pb

N = 12
TEXTS = ("word " * 70 + "one", "And two", "word " * 40 + "three", "And four")


def policy(name: str) -> dict[str, object]:
    return {"name": name, **SMALL[name]}


async def audited(peer: Peer) -> admin_pb2.VerifySummary:
    """What a verification finds that computes every sealed cell again."""
    call = peer.admin.VerifyStore(admin_pb2.VerifyStoreRequest(recompute=True), metadata=peer.metadata)
    return [event.summary async for event in call if event.HasField("summary")][-1]


def test_every_policy_is_tried_here():
    assert SMALL.keys() == POLICIES.keys()


@pytest.mark.parametrize("name", sorted(SMALL))
async def test_a_session_lives_under_it_over_turns_a_fork_and_a_restart(daemons: Daemons, name: str):
    daemon = await daemons.start()
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.", policy=policy(name))).session_id
        for text in TEXTS[:3]:
            turn = await peer.turn(session, text, max_tokens=N)
            assert turn.finished.usage.generated_tokens == N
            assert list(turn.finished.notices) == []
        branch = await peer.call(peer.sessions.ForkSession, pb.ForkSessionRequest(session_id=session))
        assert branch.policy.name == name
        await peer.settled(session)
    daemon = await daemons.restart(daemon)
    async with peer_of(daemon.port) as peer:
        assert (await peer.get(session)).policy.name == name
        for one in (session, branch.session_id):
            turn = await peer.turn(one, TEXTS[3], max_tokens=N)
            assert turn.finished.usage.generated_tokens == N
            await peer.settled(one)
        summary = await audited(peer)
        assert summary.cells_recomputed > 0
        assert dict(summary.findings) == {}


async def test_a_turn_may_have_its_own_and_the_session_another_one_at_any_time(peer: Peer, monkeypatch):
    """Which one chose is told by one that cannot."""
    session = (await peer.create(system="Be brief.")).session_id
    await peer.turn(session, TEXTS[0], max_tokens=N)

    def broken(self, view):
        raise RuntimeError("no answer")

    monkeypatch.setattr(WindowSelector, "prompt", broken)

    async def complains(**options) -> bool:
        return bool((await peer.turn(session, TEXTS[1], max_tokens=N, **options)).finished.notices)

    assert not await complains()
    assert await complains(policy=policy("window"))
    found = await peer.get(session)
    assert found.policy.name == "full"
    found.policy.name = "window"
    assert (await peer.update(found, "policy")).policy.name == "window"
    assert await complains()
    assert not await complains(policy="sieve")
    assert not await complains(policy="full")


@pytest.mark.parametrize(
    "knobs", [{"recent": 0}, {"recent": 2.5}, {"sinks": -1}, {"recent": "many"}], ids=lambda knobs: str(knobs)
)
async def test_a_bad_knob_is_refused_with_the_allowed_range(peer: Peer, knobs: dict[str, object]):
    with refused("INVALID_CONFIG", StatusCode.INVALID_ARGUMENT) as caught:
        await peer.create(system="x", policy={"name": "window", **knobs})
    assert "from" in str(caught.value)
    assert caught.value.metadata["knob"] in knobs
    session = (await peer.create(system="x")).session_id
    with refused("INVALID_CONFIG", StatusCode.INVALID_ARGUMENT):
        await peer.turn(session, "Hi", policy={"name": "window", **knobs})
    assert len(await peer.revisions(session)) == 1


@pytest.mark.parametrize("name", ["layers", "prior"])
async def test_policies_within_policies_cross_the_wire_both_ways(peer: Peer, name: str):
    session = (await peer.create(system="Be brief.", policy=policy(name))).session_id
    found = (await peer.get(session)).policy
    assert parse(found.name, MessageToDict(found.knobs)) == parse(name, SMALL[name])
    for text, options in ((TEXTS[0], {}), (TEXTS[1], {}), (TEXTS[3], {"policy": policy("viewed")})):
        assert list((await peer.turn(session, text, max_tokens=N, **options)).finished.notices) == []


@pytest.mark.parametrize(
    ("name", "knobs", "knob", "allowed"),
    [
        ("viewed", {"of": "sieve"}, "of", "a policy"),
        ("prior", {"of": {"share": 0.5}}, "of", "a policy"),
        ("layers", {"rules": []}, "rules", "one or more"),
        ("layers", {"rules": [{"layers": "0-5", "policy": {"name": "window"}}]}, "rules", "[0, 1]"),
    ],
    ids=["a name", "no name", "no rules", "no such layer"],
)
async def test_a_bad_part_is_refused_with_what_is_allowed(peer: Peer, name: str, knobs: Any, knob: str, allowed: str):
    with refused("INVALID_CONFIG", StatusCode.INVALID_ARGUMENT) as caught:
        await peer.create(system="x", policy={"name": name, **knobs})
    assert caught.value.metadata["policy"] == name
    assert caught.value.metadata["knob"] == knob
    assert allowed in caught.value.metadata["range"]


async def test_a_policy_that_raises_falls_back_to_full_and_says_so(peer: Peer, monkeypatch):
    session = (await peer.create(system="Be brief.")).session_id
    await peer.turn(session, TEXTS[0], max_tokens=N)
    plain = (await peer.create(system="Be brief.")).session_id
    await peer.turn(plain, TEXTS[0], max_tokens=N)

    def broken(self, view):
        raise RuntimeError("no answer")

    monkeypatch.setattr(WindowSelector, "prompt", broken)
    monkeypatch.setattr(WindowSelector, "step", broken)
    turn = await peer.turn(session, TEXTS[1], max_tokens=N, policy=policy("window"))
    assert ["window" in notice and "no answer" in notice for notice in turn.finished.notices] == [True]
    assert turn.ids == (await peer.turn(plain, TEXTS[1], max_tokens=N)).ids


def nested(depth: int) -> dict[str, object]:
    policy: dict[str, object] = {"name": "full"}
    for _ in range(depth):
        policy = {"name": "viewed", "of": policy}
    return policy


@pytest.mark.parametrize(
    ("asked", "knob"),
    [
        (nested(9), "of"),
        (nested(30), "of"),
        ({"name": "sieve", "mass": float("nan")}, "mass"),
        ({"name": "window", "recent": float("-inf")}, "recent"),
        ({"name": "shadowkv", "rank": 60000}, "rank"),
        ({"name": "layers", "rules": [{"layers": "0-99", "policy": {"name": "sieve"}}]}, "rules"),
        ({"name": "viewed", "of": {"name": "auto"}}, "of"),
    ],
    ids=["deep", "deeper", "nan", "inf", "rank", "layers", "nested"],
)
async def test_one_that_does_not_fit_the_model_is_refused_with_what_would(
    peer: Peer, asked: dict[str, object], knob: str
):
    session = (await peer.create(system="x")).session_id
    for refuse in (peer.create(system="x", policy=asked), peer.turn(session, "Hi", policy=asked)):
        with refused("INVALID_CONFIG", StatusCode.INVALID_ARGUMENT) as caught:
            await refuse
        assert caught.value.metadata["knob"] == knob
        assert caught.value.metadata["range"]


async def test_policies_within_each_other_as_deep_as_allowed_are_listed_and_told(peer: Peer):
    session = (await peer.create(system="x", policy=nested(8))).session_id
    assert [one.session_id for one in (await peer.list()).sessions] == [session]
    await peer.turn(session, "Hi", max_tokens=2)
    told = await peer.call(peer.sessions.ExplainTurn, pb.ExplainTurnRequest(session_id=session))
    assert told.turns[0].policy.name == (await peer.get(session)).policy.name == "viewed"


async def test_an_unknown_knob_is_refused_with_those_there_are(peer: Peer):
    with refused("UNKNOWN_POLICY", StatusCode.INVALID_ARGUMENT) as caught:
        await peer.create(system="x", policy={"name": "viewed", "of": {"name": "sieve", "moost": 3}})
    assert caught.value.metadata["knob"] == "moost"
    assert "least, most" in str(caught.value)
