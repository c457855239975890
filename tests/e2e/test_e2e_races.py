"""Clients that go away, and calls that meet on one session, at the worst moment."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from e2e_daemon import Daemons, Gate, Peer, happened, peer_of, refused
from grpc import StatusCode
from test_e2e_detach import suspend_one, until_state

from sessiond.errors import DiskFull
from sessiond.v1 import sessions_pb2 as pb

LONG = "word " * 60  # whole cells and a tail
OTHER = "other thing " * 40


@pytest.fixture
def settings(settings):
    return {**settings, "detached_turn_seconds": 0.0}


def held(write: Callable[..., Future[None]], until: threading.Event) -> Callable[..., Future[None]]:
    """A log whose acknowledgements wait."""

    def slow(batch):
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        real = write(batch)

        def finish() -> None:
            until.wait(20)
            try:
                done.set_result(real.result())
            except Exception as error:  # noqa: BLE001 - carried over
                done.set_exception(error)

        threading.Thread(target=finish).start()
        return done

    return slow


def full(batch) -> Future[None]:
    refused: Future[None] = Future()
    refused.set_exception(DiskFull("no space", retry_after=1.0))
    return refused


async def test_an_abort_whose_client_goes_away_leaves_no_kv_of_the_turn(peer: Peer, daemon, monkeypatch):
    plain = (await peer.create(system="Be brief.")).session_id
    expected = (await peer.turn(plain, OTHER, max_tokens=16)).ids
    session = (await peer.create(system="Be brief.")).session_id
    gate = Gate(daemon)
    await suspend_one(peer, gate, session, "turn-1", text=LONG)
    gate.open()
    durable, asked = threading.Event(), threading.Event()
    slow = held(daemon.desk.store.log.write, durable)
    with monkeypatch.context() as patch:
        patch.setattr(daemon.desk.store.log, "write", lambda batch: (asked.set(), slow(batch))[1])
        call = peer.sessions.AbortTurn(pb.AbortTurnRequest(session_id=session, request_id="turn-1"))
        await happened(asked)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        durable.set()
        await until_state(peer, session)
    turn = await peer.turn(session, OTHER, max_tokens=16, request_id="turn-2")
    assert turn.ids == expected


async def test_a_turn_whose_client_goes_away_while_it_begins_runs_and_then_stands_suspended(
    peer: Peer, daemon, monkeypatch
):
    session = (await peer.create(system="Be brief.")).session_id
    gate = Gate(daemon)
    unsettle, begun, go = daemon.desk.unsettle, threading.Event(), asyncio.Event()

    async def slow(live):
        begun.set()
        await go.wait()
        await unsettle(live)

    monkeypatch.setattr(daemon.desk, "unsettle", slow)
    stream = peer.open(session, "Tell me", max_tokens=40, request_id="turn-1")
    await happened(begun)
    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream.read()
    go.set()  # nobody listens, and this daemon waits for nobody
    gate.open()
    await until_state(peer, session, suspended="turn-1")


async def test_a_session_that_leaves_memory_as_a_turn_arrives_runs_it_once(daemons: Daemons, monkeypatch):
    daemon = await daemons.start(idle_seconds=0.3, sweep_seconds=0.05, settle_seconds=0.0)
    async with peer_of(daemon.port) as peer:
        plain = (await peer.create(system="Be brief.")).session_id
        await peer.turn(plain, LONG, max_tokens=4)
        expected = (await peer.turn(plain, "Tell me", max_tokens=12)).ids
        session = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, LONG, max_tokens=4)
        await peer.settled(session)
        leaving, give_back = threading.Event(), daemon.desk.tiers.memory.give_back

        def slow(cache):
            leaving.set()
            time.sleep(0.3)
            give_back(cache)

        monkeypatch.setattr(daemon.desk.tiers.memory, "give_back", slow)
        await happened(leaving)
        gate = Gate(daemon)
        first = peer.open(session, "Tell me", max_tokens=12, request_id="turn-1")
        gate.let(3)
        await first.read_tokens(2)
        assert (await peer.get(session)).running_request_id == "turn-1"
        second = peer.open(session, "Tell me", max_tokens=12, request_id="turn-1")
        joined = await second.read_tokens(2)
        assert joined.accepted.attachment == pb.ATTACHMENT_JOINED
        gate.open()
        assert (await first.read()).ids == expected
        assert (await second.read()).ids == expected


async def test_an_abort_that_waits_for_the_turn_to_end_takes_nothing_back(peer: Peer, daemon, monkeypatch):
    session = (await peer.create(system="Be brief.")).session_id
    gate = Gate(daemon)
    await suspend_one(peer, gate, session, "turn-1")
    gate.open()
    unsettle, begun, go = daemon.desk.unsettle, threading.Event(), asyncio.Event()

    async def slow(live):
        begun.set()
        await go.wait()
        await unsettle(live)

    with monkeypatch.context() as patch:
        patch.setattr(daemon.desk, "unsettle", slow)
        stream = peer.open(session, "Tell me", max_tokens=40, request_id="turn-1")
        await happened(begun)
        aborting = asyncio.create_task(peer.abort(session, "turn-1"))
        await peer.get(session)  # the abort came before
        await asyncio.sleep(0.05)
        go.set()
        turn = await stream.read()
        answer = await aborting
    assert (answer.stopped, answer.revision_id) == (False, turn.finished.revision_id)
    assert (await peer.get(session)).head_revision_id == turn.finished.revision_id


async def test_a_refused_turn_does_not_stop_what_goes_on_behind_the_last_one(daemons: Daemons):
    daemon = await daemons.start(settle_seconds=0.3)
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, LONG, max_tokens=4)
        with refused("REVISION_MISMATCH", StatusCode.ABORTED):
            await peer.turn(session, "x", max_tokens=4, base_revision="nope")
        await peer.settled(session)


async def test_an_abort_that_cannot_be_written_says_so(peer: Peer, daemon, monkeypatch):
    session = (await peer.create(system="Be brief.")).session_id
    gate = Gate(daemon)
    gate.let(3)
    stream = peer.open(session, "Tell me", max_tokens=40, request_id="turn-1")
    await stream.read_tokens(2)
    await gate.reached()
    with monkeypatch.context() as patch:
        patch.setattr(daemon.desk.store.log, "write", full)
        aborting = asyncio.create_task(peer.abort(session, "turn-1"))
        await gate.cancelled()
        gate.open()
        with refused("DISK_FULL", StatusCode.RESOURCE_EXHAUSTED):
            await aborting
    assert (await peer.get(session)).suspended_request_id == "turn-1"


async def test_the_last_token_refused_is_not_a_finished_turn(peer: Peer, daemon, monkeypatch):
    """The token that ends the turn is refused, and space comes back before the commit."""
    plain = (await peer.create(system="Be brief.")).session_id
    expected = (await peer.turn(plain, "Tell me", max_tokens=4)).ids
    session = (await peer.create(system="Be brief.")).session_id
    gate = Gate(daemon)
    gate.let(3)
    stream = peer.open(session, "Tell me", max_tokens=4, request_id="turn-1")
    await stream.read_tokens(3)
    await gate.reached()
    write = daemon.desk.store.log.write
    monkeypatch.setattr(
        daemon.desk.store.log, "write", lambda batch: (setattr(daemon.desk.store.log, "write", write), full(batch))[1]
    )
    gate.open()
    turn = await stream.read()
    assert turn.error is not None
    assert turn.error.reason == "DISK_FULL"
    rest = await peer.turn(session, "Tell me", max_tokens=4, request_id="turn-1", resume_after_tokens=3)
    assert turn.ids + rest.ids == expected
