"""A log that takes no more tokens while a turn runs: nothing acknowledged is lost, nothing wrong stays in memory."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import pytest
from e2e_daemon import Gate, Peer, refused
from grpc import StatusCode

from sessiond.errors import DiskFull, SessiondError
from sessiond.v1 import admin_pb2
from sessiond.v1 import sessions_pb2 as pb

LONG = 30
SEEN = 6
TEXT = "word " * 60  # whole cells and a tail


@pytest.fixture
async def session(peer: Peer) -> str:
    session = (await peer.create(system="Be brief.")).session_id
    await peer.turn(session, "Tell me", max_tokens=8)
    return session


@pytest.fixture
async def undisturbed(peer: Peer) -> list[int]:
    """The second turn's tokens where nothing happens to it."""
    session = (await peer.create(system="Be brief.")).session_id
    await peer.turn(session, "Tell me", max_tokens=8)
    return (await peer.turn(session, TEXT, max_tokens=LONG)).ids


async def tokens(peer: Peer) -> admin_pb2.TokenTotals:
    return (await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())).tokens


async def broken_off(peer: Peer, daemon, session: str, monkeypatch, error: SessiondError) -> list[int]:
    """Run a turn whose log fails with `error` once some tokens are streamed. On return the log works again."""
    gate = Gate(daemon)
    stream = peer.open(session, TEXT, max_tokens=LONG, request_id="turn-1")
    gate.let(SEEN + len(TEXT) // 128)
    await stream.read_tokens(SEEN)
    await gate.reached()
    refused: Future[None] = Future()
    with monkeypatch.context() as patch:
        patch.setattr(daemon.desk.store.log, "write", lambda batch: refused)
        gate.let(1)
        await gate.reached()  # the engine is inside the step behind the token whose write fails
    refused.set_exception(error)
    await gate.cancelled()
    await asyncio.sleep(0.1)
    gate.open()
    turn = await stream.read()
    assert turn.error is not None
    assert turn.error.reason == error.reason
    return turn.ids


class TestADiskThatIsFull:
    async def test_leaves_the_turn_to_go_on_with_what_was_computed(
        self, peer: Peer, daemon, session: str, undisturbed, monkeypatch
    ):
        seen = await broken_off(peer, daemon, session, monkeypatch, DiskFull("no space", retry_after=1.0))
        assert seen == undisturbed[: len(seen)]
        assert (await peer.get(session)).suspended_request_id == "turn-1"
        before = await tokens(peer)
        rest = await peer.turn(session, TEXT, max_tokens=LONG, request_id="turn-1", resume_after_tokens=len(seen))
        assert rest.accepted.attachment == pb.ATTACHMENT_RESUMED
        assert seen + rest.ids == undisturbed
        after = await tokens(peer)
        assert (after.prefilled, after.recomputed) == (before.prefilled, before.recomputed)
        assert rest.accepted.prompt_tokens_new == 0

    async def test_leaves_memory_and_goes_on_from_disk(
        self, peer: Peer, daemon, session: str, undisturbed, monkeypatch
    ):
        seen = await broken_off(peer, daemon, session, monkeypatch, DiskFull("no space", retry_after=1.0))
        await peer.suspend(session)
        whole = await peer.turn(session, TEXT, max_tokens=LONG, request_id="turn-1")
        assert whole.ids == undisturbed
        assert whole.ids[: len(seen)] == seen

    async def test_spoils_nothing_for_the_turn_that_supersedes(
        self, peer: Peer, daemon, session: str, undisturbed, monkeypatch
    ):
        held = daemon.desk.live("default", session).cache.length
        await broken_off(peer, daemon, session, monkeypatch, DiskFull("no space", retry_after=1.0))
        with refused("TURN_SUSPENDED", StatusCode.ABORTED):
            await peer.turn(session, "x", max_tokens=1, request_id="turn-2")
        await peer.turn(session, "x", mode="append_only", request_id="turn-3", supersede=True)
        assert daemon.desk.live("default", session).cache.length <= held + 1


class TestALogThatFails:
    async def test_ends_the_turn_and_takes_its_kv_along(
        self, peer: Peer, daemon, session: str, undisturbed, monkeypatch
    ):
        """The engine is in a step of the turn when it fails: what that step writes must not outlive the turn."""
        count = (await peer.get(session)).token_count
        await broken_off(peer, daemon, session, monkeypatch, SessiondError("who knows"))
        now = await peer.get(session)
        assert (now.suspended_request_id, now.token_count) == ("", count)
        assert daemon.desk.live("default", session).cache.length <= count
        then = await peer.turn(session, TEXT, max_tokens=LONG, request_id="turn-2")
        assert then.ids == undisturbed
