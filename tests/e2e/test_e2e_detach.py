"""A client that leaves: its turn runs on, then stands suspended, and is taken up again, given up or aborted."""

from __future__ import annotations

import asyncio

import pytest
from e2e_daemon import PATIENCE, Gate, Peer, Turn, everything, peer_of, refused
from e2e_model import NO_END
from grpc import StatusCode

from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2

SAMPLINGS = [{}, {"temperature": 3.0, "seed": 7, "logit_bias": NO_END}]
LONG = 40


async def until_state(peer: Peer, session: str, *, suspended: str = "", running: str = "") -> types_pb2.Session:
    async with asyncio.timeout(PATIENCE):
        while True:
            now = await peer.get(session)
            if (now.suspended_request_id, now.running_request_id) == (suspended, running):
                return now
            await asyncio.sleep(0.02)


async def uninterrupted(peer: Peer, **options) -> tuple[Turn, Turn]:
    """The turn that the tests cut off, in a session of its own where nothing happens to it, and the one after."""
    session = (await peer.create(system="Be brief.")).session_id
    turn = await peer.turn(session, "Tell me", max_tokens=LONG, **options)
    return turn, await peer.turn(session, "And then?", max_tokens=8)


async def suspend_one(
    peer: Peer, gate: Gate, session: str, request_id: str, tokens: int = 6, *, text: str = "Tell me", **options
) -> Turn:
    """Start a turn, leave it after some tokens, and wait until it stands suspended."""
    stream = peer.open(session, text, max_tokens=LONG, request_id=request_id, **options)
    gate.let(tokens + len(text) // 100)  # a long text is computed in several steps
    turn = await stream.read_tokens(tokens)
    stream.cancel()
    await gate.cancelled()
    gate.let(1)  # the step that waits; then the turn is taken out
    await until_state(peer, session, suspended=request_id)
    return turn


async def test_who_comes_back_while_the_turn_is_being_suspended_takes_it_up(daemons):
    daemon = await daemons.start(detached_turn_seconds=0.0)
    async with peer_of(daemon.port) as peer:
        whole, _ = await uninterrupted(peer)
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=LONG, request_id="turn-1")
        gate.let(4)
        seen = await stream.read_tokens(4)
        stream.cancel()
        await gate.cancelled()  # it will be suspended when the step that waits is over
        back = peer.open(session, "Tell me", max_tokens=LONG, request_id="turn-1", resume_after_tokens=4)
        await asyncio.sleep(0.05)
        gate.open()
        turn = await back.read()
        assert turn.error is None
        assert turn.accepted.attachment == pb.ATTACHMENT_RESUMED
        assert seen.ids + turn.ids == whole.ids


class TestALostStream:
    async def test_leaves_the_turn_running_to_its_end(self, peer: Peer, daemon):
        whole, after = await uninterrupted(peer)
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=LONG, request_id="turn-1")
        gate.let(3)
        await stream.read_tokens(3)
        stream.cancel()
        gate.open()
        now = await until_state(peer, session)
        revision = (await peer.revisions(session))[-1]
        assert now.head_revision_id == revision.revision_id
        assert revision.answer == whole.finished.answer
        again = await peer.turn(session, "Tell me", max_tokens=LONG, request_id="turn-1", resume_after_tokens=3)
        assert again.accepted.attachment == pb.ATTACHMENT_REPLAYED
        assert again.ids == whole.ids[3:]
        assert (await peer.turn(session, "And then?", max_tokens=8)).ids == after.ids

    async def test_of_one_listener_leaves_the_others(self, peer: Peer, daemon):
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        gate.let(3)
        stream = peer.open(session, "Tell me", max_tokens=8, request_id="turn-1", abort_on_disconnect=True)
        await stream.read_tokens(3)
        other = peer.open(session, "Tell me", max_tokens=8, request_id="turn-1")
        await other.read_tokens(3)
        stream.cancel()
        await asyncio.sleep(0.1)
        gate.open()
        turn = await other.read()
        assert turn.error is None
        assert len(turn.ids) == 8

    async def test_with_a_deadline_only_detaches(self, peer: Peer, daemon):
        gate = Gate(daemon)
        for deadline in (0.3, 2, 10):  # a deadline that passes before the turn begins proves nothing: try a later one
            session = (await peer.create(system="Be brief.")).session_id
            request = pb.GenerateRequest(session_id=session, request_id="turn-1")
            request.messages.add(role="user").content.add(text="Tell me")
            request.sampling.max_tokens = 5
            call = peer.sessions.Generate(request, timeout=deadline)
            with pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
                async for _ in call:
                    pass
            if (await peer.get(session)).running_request_id:
                break
        gate.open()
        await until_state(peer, session)
        assert (await peer.revisions(session))[-1].usage.generated_tokens == 5

    async def test_with_abort_on_disconnect_ends_the_turn_and_leaves_nothing(self, peer: Peer, daemon):
        _, after = await uninterrupted(peer)
        session = await peer.create(system="Be brief.")
        gate = Gate(daemon)
        stream = peer.open(
            session.session_id, "Tell me", max_tokens=LONG, request_id="turn-1", abort_on_disconnect=True
        )
        gate.let(4)
        await stream.read_tokens(4)
        stream.cancel()
        await gate.cancelled()
        gate.open()
        now = await until_state(peer, session.session_id)
        assert now.head_revision_id == session.head_revision_id
        assert now.token_count == session.token_count
        assert len(await peer.revisions(session.session_id)) == 1
        # What is left of its KV spoils nothing.
        whole = await peer.turn(session.session_id, "Tell me", max_tokens=LONG, request_id="turn-2")
        assert (await peer.turn(session.session_id, "And then?", max_tokens=8)).ids == after.ids
        assert len(whole.ids) == LONG


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
class TestASuspendedTurn:
    @pytest.fixture
    async def daemon(self, daemons):
        return await daemons.start(detached_turn_seconds=0.05)

    async def test_goes_on_where_it_stood(self, peer: Peer, daemon, sampling):
        whole, after = await uninterrupted(peer, **sampling)
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        seen = await suspend_one(peer, gate, session, "turn-1", **sampling)
        assert seen.ids == whole.ids[:6]
        gate.open()
        rest = await peer.turn(
            session, "Tell me", max_tokens=LONG, request_id="turn-1", resume_after_tokens=6, **sampling
        )
        assert rest.accepted.attachment == pb.ATTACHMENT_RESUMED
        assert rest.accepted.turn_revision_id == seen.accepted.turn_revision_id
        assert seen.ids + rest.ids == whole.ids
        assert rest.answer == whole.answer
        assert rest.finished.finish_reason == whole.finished.finish_reason
        assert rest.finished.usage.generated_tokens == LONG
        assert (await peer.turn(session, "And then?", max_tokens=8)).ids == after.ids

    async def test_is_told_again_from_the_start_to_a_client_that_forgot(self, peer: Peer, daemon, sampling):
        whole, _ = await uninterrupted(peer, **sampling)
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        await suspend_one(peer, gate, session, "turn-1", **sampling)
        gate.open()
        again = await peer.turn(session, "Tell me", max_tokens=LONG, request_id="turn-1", **sampling)
        assert again.ids == whole.ids
        assert again.text == whole.text
        assert [part.first_token_index for part in again.tokens] == list(range(LONG))

    async def test_goes_on_after_its_session_left_memory(self, peer: Peer, daemon, sampling):
        whole, after = await uninterrupted(peer, **sampling)
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        await suspend_one(peer, gate, session, "turn-1", **sampling)
        gate.open()
        now = (await peer.suspend(session)).session
        assert now.tier == types_pb2.TIER_COLD
        assert now.suspended_request_id == "turn-1"
        rest = await peer.turn(session, "Tell me", max_tokens=LONG, request_id="turn-1", **sampling)
        assert rest.ids == whole.ids
        assert (await peer.turn(session, "And then?", max_tokens=8)).ids == after.ids

    async def test_with_a_long_input_leaves_memory_too(self, peer: Peer, daemon, sampling):
        """Its cache holds whole cells beyond the history. Of the history nothing is computed again."""
        text = "word " * 80
        other = (await peer.create(system="Be brief.")).session_id
        session = (await peer.create(system="Be brief.")).session_id
        for one in (other, session):
            said = await peer.turn(one, "word " * 40, max_tokens=8)
            await peer.settled(one)
        whole = await peer.turn(other, text, max_tokens=LONG, **sampling)
        gate = Gate(daemon)
        await suspend_one(peer, gate, session, "turn-1", text=text, **sampling)
        gate.open()
        now = await peer.get(session)
        assert now.exact_upto <= now.token_count == said.finished.committed_tokens
        now = (await peer.suspend(session)).session
        assert now.tier == types_pb2.TIER_COLD
        assert now.persisted_upto == now.token_count, "the turn had fed the last token of the history"
        rest = await peer.turn(session, text, max_tokens=LONG, request_id="turn-1", **sampling)
        assert rest.ids == whole.ids
        # of the history nothing; what the turn itself had computed was nobody's yet when it left memory
        assert {reason.reason for reason in rest.restored.reasons} == {pb.RECOMPUTE_CAUSE_INTERRUPTED_TURN}

    async def test_goes_on_after_a_restart(self, peer: Peer, daemon, daemons, sampling):
        whole, after = await uninterrupted(peer, **sampling)
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        await suspend_one(peer, gate, session, "turn-1", **sampling)
        gate.open()
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as again:
            assert (await again.get(session)).suspended_request_id == "turn-1"
            rest = await again.turn(session, "Tell me", max_tokens=LONG, request_id="turn-1", **sampling)
            assert rest.ids == whole.ids
            assert (await again.turn(session, "And then?", max_tokens=8)).ids == after.ids

    async def test_can_be_suspended_twice(self, peer: Peer, daemon, sampling):
        whole, _ = await uninterrupted(peer, **sampling)
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        for tokens in (4, 9):
            await suspend_one(peer, gate, session, "turn-1", tokens, **sampling)
        gate.open()
        rest = await peer.turn(session, "Tell me", max_tokens=LONG, request_id="turn-1", **sampling)
        assert rest.ids == whole.ids


class TestAnotherTurnThatMeetsASuspendedOne:
    @pytest.fixture
    async def daemon(self, daemons):
        return await daemons.start(detached_turn_seconds=0.05)

    async def test_is_told_its_id(self, peer: Peer, daemon):
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        await suspend_one(peer, gate, session, "turn-1")
        gate.open()
        before = await everything(peer, session)
        with refused("TURN_SUSPENDED", StatusCode.ABORTED) as error:
            await peer.turn(session, "Something else", max_tokens=3, request_id="turn-2")
        assert error.value.metadata["request_id"] == "turn-1"
        assert await everything(peer, session) == before

    async def test_supersedes_it_if_it_says_so(self, peer: Peer, daemon):
        whole, after = await uninterrupted(peer)
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        await suspend_one(peer, gate, session, "turn-1", temperature=3.0, seed=1)
        gate.open()
        turn = await peer.turn(session, "Tell me", max_tokens=LONG, request_id="turn-2", supersede=True)
        assert turn.ids == whole.ids
        assert len(await peer.revisions(session)) == 2
        assert (await peer.turn(session, "And then?", max_tokens=8)).ids == after.ids
        given_up = await peer.turn(session, "Tell me", max_tokens=LONG, request_id="turn-1", temperature=3.0, seed=1)
        assert given_up.finished.finish_reason == types_pb2.FINISH_REASON_ABORTED
        assert given_up.finished.revision_id == ""


class TestAbort:
    @pytest.mark.parametrize("standing", ["running", "suspended"])
    async def test_with_commit_keeps_what_was_said(self, daemons, standing: str):
        daemon = await daemons.start(detached_turn_seconds=0.05 if standing == "suspended" else 60)
        async with peer_of(daemon.port) as peer:
            whole, _ = await uninterrupted(peer)
            session = (await peer.create(system="Be brief.")).session_id
            gate = Gate(daemon)
            if standing == "suspended":
                await suspend_one(peer, gate, session, "turn-1")
                gate.open()
                result = await peer.abort(session, "turn-1", commit=True)
            else:
                stream = peer.open(session, "Tell me", max_tokens=LONG, request_id="turn-1")
                gate.let(6)
                await stream.read_tokens(6)
                aborting = asyncio.create_task(peer.abort(session, "turn-1", commit=True))
                await gate.cancelled()
                gate.open()
                result = await aborting
                told = await stream.read()
                assert told.finished.finish_reason == types_pb2.FINISH_REASON_ABORTED
                assert told.finished.revision_id == result.revision_id
                assert told.text == told.answer
            assert result.stopped
            assert 6 <= result.generated_tokens < LONG
            revision = (await peer.revisions(session))[-1]
            assert revision.revision_id == result.revision_id == (await peer.get(session)).head_revision_id
            assert revision.aborted
            assert revision.finish_reason == types_pb2.FINISH_REASON_ABORTED
            said = revision.answer.content[0].text
            assert said
            assert whole.answer.startswith(said)
            # The next turn closes what was cut off, and the same history told in one go gives the same answer.
            then = await peer.turn(session, "And then?", max_tokens=8)
            fresh = await peer.create(system="Be brief.")
            n = result.generated_tokens
            await peer.turn(fresh.session_id, "Tell me", max_tokens=n)
            assert (await peer.turn(fresh.session_id, "And then?", max_tokens=8)).ids == then.ids

    @pytest.mark.parametrize("standing", ["running", "suspended"])
    async def test_without_commit_leaves_nothing(self, daemons, standing: str):
        daemon = await daemons.start(detached_turn_seconds=0.05 if standing == "suspended" else 60)
        async with peer_of(daemon.port) as peer:
            whole, after = await uninterrupted(peer)
            session = await peer.create(system="Be brief.")
            gate = Gate(daemon)
            if standing == "suspended":
                await suspend_one(peer, gate, session.session_id, "turn-1")
                gate.open()
                result = await peer.abort(session.session_id, "turn-1")
            else:
                stream = peer.open(session.session_id, "Tell me", max_tokens=LONG, request_id="turn-1")
                gate.let(6)
                await stream.read_tokens(6)
                aborting = asyncio.create_task(peer.abort(session.session_id, "turn-1"))
                await gate.cancelled()
                gate.open()
                result = await aborting
                told = await stream.read()
                assert told.finished.finish_reason == types_pb2.FINISH_REASON_ABORTED
            assert result.stopped
            assert result.revision_id == ""
            now = await peer.get(session.session_id)
            assert now.head_revision_id == session.head_revision_id
            assert (now.suspended_request_id, now.running_request_id) == ("", "")
            # Its KV stays usable.
            turn = await peer.turn(session.session_id, "Tell me", max_tokens=LONG, request_id="turn-2")
            assert turn.ids == whole.ids
            assert (await peer.turn(session.session_id, "And then?", max_tokens=8)).ids == after.ids

    async def test_again_changes_nothing(self, peer: Peer, daemon):
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=LONG, request_id="turn-1")
        gate.let(5)
        await stream.read_tokens(5)
        aborting = asyncio.create_task(peer.abort(session, "turn-1", commit=True))
        await gate.cancelled()
        gate.open()
        first = await aborting
        before = await peer.get(session)
        again = await peer.abort(session, "turn-1", commit=True)
        assert not again.stopped
        assert again.revision_id == first.revision_id
        assert again.generated_tokens == first.generated_tokens
        assert (await peer.abort(session, "turn-1")).revision_id == first.revision_id
        after = await peer.get(session)
        assert (after.etag, after.head_revision_id) == (before.etag, before.head_revision_id)

    async def test_of_a_finished_turn_says_how_it_ended(self, peer: Peer):
        session = (await peer.create(system="Be brief.")).session_id
        turn = await peer.turn(session, "Tell me", max_tokens=5, request_id="turn-1")
        result = await peer.abort(session, "turn-1", commit=True)
        assert not result.stopped
        assert result.revision_id == turn.finished.revision_id
        assert result.generated_tokens == 5

    async def test_of_a_prompt_that_is_still_computed_commits_only_the_prompt(self, peer: Peer, daemon):
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        stream = peer.open(session, "word " * 60, max_tokens=LONG, request_id="turn-1")
        await gate.reached()
        aborting = asyncio.create_task(peer.abort(session, "turn-1", commit=True))
        await gate.cancelled()
        gate.open()
        result = await aborting
        assert (result.stopped, result.generated_tokens) == (True, 0)
        assert (await stream.read()).finished.finish_reason == types_pb2.FINISH_REASON_ABORTED
        assert (await peer.turn(session, "And then?", max_tokens=3)).finished.revision_id

    async def test_of_an_unknown_turn_is_not_found(self, peer: Peer):
        session = (await peer.create(system="Be brief.")).session_id
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await peer.abort(session, "no-such-turn")

    async def test_names_its_turn(self, peer: Peer):
        session = (await peer.create(system="Be brief.")).session_id
        with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
            await peer.abort(session, "")
