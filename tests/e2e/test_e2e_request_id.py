"""A request_id names a turn: the same id never runs it twice, and one session runs one turn at a time."""

from __future__ import annotations

import asyncio

import pytest
from e2e_daemon import Gate, Peer, everything, peer_of, refused
from grpc import StatusCode
from transformers import AutoTokenizer

from sessiond.v1 import sessions_pb2 as pb


@pytest.fixture
async def session(peer: Peer) -> str:
    return (await peer.create(system="Be brief.")).session_id


class TestAFinishedTurn:
    async def test_is_replayed_with_the_same_tokens_text_and_revision(self, peer: Peer, session: str):
        asked = {"max_tokens": 12, "request_id": "turn-1", "temperature": 2.0}
        first = await peer.turn(session, "Tell me", **asked)
        again = await peer.turn(session, "Tell me", **asked)
        assert first.accepted.attachment == pb.ATTACHMENT_STARTED
        assert again.accepted.attachment == pb.ATTACHMENT_REPLAYED
        assert (again.ids, again.text) == (first.ids, first.text)
        assert again.finished.revision_id == first.finished.revision_id
        assert again.finished.usage == first.finished.usage
        assert again.finished.finish_reason == first.finished.finish_reason
        assert again.finished.answer == first.finished.answer
        assert again.accepted.log_start == first.accepted.log_start
        assert (await peer.get(session)).head_revision_id == first.finished.revision_id

    async def test_is_replayed_from_where_the_client_says(self, peer: Peer, session: str):
        first = await peer.turn(session, "Tell me", max_tokens=12, request_id="turn-1")
        for skip in (1, 5, 12, 100):
            again = await peer.turn(session, "Tell me", max_tokens=12, request_id="turn-1", resume_after_tokens=skip)
            assert again.ids == first.ids[skip:]
            if again.tokens:
                assert again.tokens[0].first_token_index == skip
                missing = first.text.encode()[: again.tokens[0].text_offset].decode()
                assert missing + again.text == first.text

    async def test_is_replayed_after_later_turns_and_a_restart(self, peer: Peer, session: str, daemons, daemon):
        first = await peer.turn(session, "Tell me", max_tokens=6, request_id="turn-1")
        second = await peer.turn(session, "More", max_tokens=6, request_id="turn-2")
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as again:
            replay = await again.turn(session, "Tell me", max_tokens=6, request_id="turn-1")
            assert (replay.ids, replay.accepted.attachment) == (first.ids, pb.ATTACHMENT_REPLAYED)
            assert (await again.get(session)).head_revision_id == second.finished.revision_id

    async def test_that_a_stop_string_ended_replays_what_was_seen(self, peer: Peer, session: str):
        free = await peer.create(system="Be brief.")
        said = (await peer.turn(free.session_id, "Tell me", max_tokens=24)).answer
        asked = {"max_tokens": 24, "request_id": "turn-1", "stop": [said[9:12]]}
        first = await peer.turn(session, "Tell me", **asked)
        again = await peer.turn(session, "Tell me", **asked)
        assert again.text == first.text == first.answer
        assert again.finished.stop == said[9:12]

    async def test_that_went_on_inside_a_character_is_replayed_with_it(self, peer: Peer, session: str, chat_model):
        """The first answer ends with half a character; what completes it is the second one's text, now and later."""
        first, second = AutoTokenizer.from_pretrained(chat_model).encode("é", add_special_tokens=False)
        await peer.turn(session, "Tell me", max_tokens=1, logit_bias={first: 100.0})
        options = {"mode": "continue", "max_tokens": 1, "logit_bias": {second: 100.0}, "request_id": "turn-2"}
        turn = await peer.turn(session, **options)
        assert turn.text == "é"
        again = await peer.turn(session, **options)
        assert again.accepted.attachment == pb.ATTACHMENT_REPLAYED
        assert again.text == "é"

    async def test_that_a_stop_string_ended_is_replayed_whole(self, peer: Peer, session: str, chat_model):
        """What is left of a token that the string split is text, though its id be a stop token's."""
        tokenizer = AutoTokenizer.from_pretrained(chat_model)
        (he,), (h,) = (tokenizer.encode(text, add_special_tokens=False) for text in ("he", "h"))
        options = {"max_tokens": 9, "logit_bias": {he: 100.0}, "stop": ["eh"], "stop_token_ids": [h]}
        turn = await peer.turn(session, "Tell me", request_id="turn-1", **options)
        assert turn.text == turn.answer == "h"
        again = await peer.turn(session, "Tell me", request_id="turn-1", **options)
        assert again.accepted.attachment == pb.ATTACHMENT_REPLAYED
        assert again.text == again.answer == "h"

    async def test_that_only_appended_is_replayed_too(self, peer: Peer, session: str):
        first = await peer.turn(session, "A fact", mode="append_only", request_id="turn-1")
        again = await peer.turn(session, "A fact", mode="append_only", request_id="turn-1")
        assert again.kinds == ["accepted", "finished"]
        assert again.finished.revision_id == first.finished.revision_id

    async def test_keeps_its_id_from_other_requests(self, peer: Peer, session: str):
        await peer.turn(session, "Tell me", max_tokens=3, request_id="turn-1")
        for text, options in (("Tell him", {"max_tokens": 3}), ("Tell me", {"max_tokens": 4})):
            with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
                await peer.turn(session, text, request_id="turn-1", **options)

    async def test_is_the_same_request_whatever_its_waiting_and_resuming(self, peer: Peer, session: str):
        first = await peer.turn(session, "Tell me", max_tokens=3, request_id="turn-1")
        again = await peer.turn(
            session, "Tell me", max_tokens=3, request_id="turn-1", wait=True, supersede=True, resume_after_tokens=1
        )
        assert again.ids == first.ids[1:]

    async def test_is_found_before_its_base_revision_is_checked(self, peer: Peer, session: str):
        root = (await peer.get(session)).head_revision_id
        first = await peer.turn(session, "Tell me", max_tokens=3, request_id="turn-1", base_revision=root)
        again = await peer.turn(session, "Tell me", max_tokens=3, request_id="turn-1", base_revision=root)
        assert again.ids == first.ids

    async def test_belongs_to_its_session(self, peer: Peer, session: str):
        other = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, "Tell me", max_tokens=3, request_id="turn-1")
        turn = await peer.turn(other, "Something else", max_tokens=3, request_id="turn-1")
        assert turn.accepted.attachment == pb.ATTACHMENT_STARTED


class TestARunningTurn:
    async def test_is_joined_from_its_beginning(self, peer: Peer, daemon, session: str):
        gate = Gate(daemon)
        gate.let(4)
        stream = peer.open(session, "Tell me", max_tokens=10, request_id="turn-1")
        await stream.read_tokens(3)
        joined = peer.open(session, "Tell me", max_tokens=10, request_id="turn-1")
        await joined.read(lambda turn: len(turn.ids) >= 3)
        late = peer.open(session, "Tell me", max_tokens=10, request_id="turn-1", resume_after_tokens=5)
        await late.read(lambda turn: turn.kinds == ["accepted"])
        gate.open()
        first, second, third = await stream.read(), await joined.read(), await late.read()
        assert first.accepted.attachment == pb.ATTACHMENT_STARTED
        assert second.accepted.attachment == third.accepted.attachment == pb.ATTACHMENT_JOINED
        assert second.ids == first.ids
        assert second.text == first.text
        assert third.ids == first.ids[5:]
        assert first.finished.revision_id == second.finished.revision_id == third.finished.revision_id

    async def test_makes_other_turns_of_its_session_busy(self, peer: Peer, daemon, session: str):
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=3, request_id="turn-1")
        await gate.reached()
        assert (await peer.get(session)).running_request_id == "turn-1"
        with refused("SESSION_BUSY", StatusCode.ABORTED) as error:
            await peer.turn(session, "Me too", max_tokens=3, request_id="turn-2")
        assert error.value.retry_after
        gate.open()
        await stream.read()
        # The refusal used up no id.
        turn = await peer.turn(session, "Another thing", max_tokens=3, request_id="turn-2")
        assert turn.accepted.attachment == pb.ATTACHMENT_STARTED

    async def test_lets_others_wait_for_it(self, peer: Peer, daemon, session: str):
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=3, request_id="turn-1")
        await gate.reached()
        waiting = [
            asyncio.create_task(peer.turn(session, f"Then {i}", max_tokens=3, wait=True, request_id=f"wait-{i}"))
            for i in range(3)
        ]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        gate.open()
        first = await stream.read()
        turns = await asyncio.gather(*waiting)
        revisions = await peer.revisions(session)
        assert revisions[1].revision_id == first.finished.revision_id
        assert {turn.finished.revision_id for turn in turns} == {r.revision_id for r in revisions[2:]}
        parents = [revision.parent_revision_id for revision in revisions]
        assert parents == ["", *(revision.revision_id for revision in revisions[:-1])]

    async def test_with_another_request_under_its_id_is_left_alone(self, peer: Peer, daemon, session: str):
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=3, request_id="turn-1")
        await gate.reached()
        with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
            await peer.turn(session, "Tell him", max_tokens=3, request_id="turn-1")
        gate.open()
        turn = await stream.read()
        assert turn.finished.revision_id

    async def test_runs_once_however_many_come_at_once(self, peer: Peer, session: str):
        # Behind an earlier turn, whose settling the new one has to stop first.
        await peer.turn(session, "word " * 60, max_tokens=3)
        turns = await asyncio.gather(
            *(peer.turn(session, "Tell me", max_tokens=5, temperature=3.0, request_id="turn-1") for _ in range(8))
        )
        assert len({turn.finished.revision_id for turn in turns}) == 1
        assert len({tuple(turn.ids) for turn in turns}) == 1
        assert len(await peer.revisions(session)) == 3

    async def test_leaves_other_sessions_free(self, peer: Peer, daemon, session: str):
        other = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=3)
        await gate.reached()
        beside = peer.open(other, "Tell me", max_tokens=3)
        await beside.read(lambda turn: "accepted" in turn.kinds)
        gate.open()
        assert (await stream.read()).ids == (await beside.read()).ids


class TestTheQueue:
    async def test_has_an_end(self, daemons, settings):
        daemon = await daemons.start(max_queued_turns=1)
        async with peer_of(daemon.port) as peer:
            one, two = [(await peer.create(system="Be brief.")).session_id for _ in range(2)]
            gate = Gate(daemon)
            stream = peer.open(one, "Tell me", max_tokens=3)
            await gate.reached()
            with refused("QUEUE_FULL", StatusCode.RESOURCE_EXHAUSTED) as error:
                await peer.turn(two, "Tell me", max_tokens=3, request_id="turn-1")
            assert error.value.retry_after
            gate.open()
            await stream.read()
            turn = await peer.turn(two, "Tell me", max_tokens=3, request_id="turn-1")
            assert turn.accepted.attachment == pb.ATTACHMENT_STARTED

    async def test_counts_those_that_wait_behind_a_turn(self, daemons, settings):
        daemon = await daemons.start(max_queued_turns=2)
        async with peer_of(daemon.port) as peer:
            one = (await peer.create(system="Be brief.")).session_id
            gate = Gate(daemon)
            stream = peer.open(one, "Tell me", max_tokens=3)
            await gate.reached()
            waiting = peer.open(one, "And then?", max_tokens=3, wait=True)
            while len(daemon.desk.places) < 2:  # noqa: ASYNC110 - the request is on its way
                await asyncio.sleep(0.01)
            with refused("QUEUE_FULL", StatusCode.RESOURCE_EXHAUSTED):
                await peer.turn(one, "And then?", max_tokens=3, wait=True)
            gate.open()
            await stream.read()
            await waiting.read()
            assert not daemon.desk.places

    async def test_many_at_once_do_not_pass_it_together(self, daemons, settings):
        daemon = await daemons.start(max_queued_turns=2)
        async with peer_of(daemon.port) as peer:
            sessions = [(await peer.create(system="Be brief.")).session_id for _ in range(6)]
            gate = Gate(daemon)
            streams = [peer.open(session, "Tell me", max_tokens=3) for session in sessions]
            await gate.reached()
            gate.open()
            turns = await asyncio.gather(*(stream.read() for stream in streams))
            codes = [turn.error.reason if turn.error else "" for turn in turns]
            assert sorted(codes) == ["", "", *["QUEUE_FULL"] * 4]
            assert not daemon.desk.places

    async def test_leaves_room_before_turns_of_low_priority(self, daemons, settings):
        daemon = await daemons.start(max_queued_turns=4)
        async with peer_of(daemon.port) as peer:
            sessions = [(await peer.create(system="Be brief.")).session_id for _ in range(5)]
            gate = Gate(daemon)
            streams = [peer.open(session, "Tell me", max_tokens=3, priority=-1) for session in sessions[:3]]
            await gate.reached()
            while len(daemon.desk.places) < 3:  # noqa: ASYNC110 - the requests are on their way
                await asyncio.sleep(0.01)
            with refused("QUEUE_FULL", StatusCode.RESOURCE_EXHAUSTED):
                await peer.turn(sessions[3], "Tell me", max_tokens=3, priority=-1)
            last = peer.open(sessions[4], "Tell me", max_tokens=3)
            gate.open()
            for stream in (*streams, last):
                await stream.read()


class TestARefusal:
    async def test_uses_up_no_id(self, peer: Peer, daemon, session: str):
        with refused("BAD_SAMPLING", StatusCode.INVALID_ARGUMENT):
            await peer.turn(session, "Tell me", temperature=-1.0, request_id="turn-1")
        with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
            await peer.turn(session, "Tell me", priority=5, request_id="turn-1")
        with refused("CONTEXT_TOO_LONG", StatusCode.INVALID_ARGUMENT):
            await peer.turn(session, "word " * 1000, request_id="turn-1")
        assert daemon.desk.store.log.requests("default", session) == []
        turn = await peer.turn(session, "Tell me", max_tokens=3, request_id="turn-1")
        assert turn.accepted.attachment == pb.ATTACHMENT_STARTED

    async def test_meets_a_turn_without_an_id(self, peer: Peer, session: str):
        request = pb.GenerateRequest(session_id=session)
        request.messages.add(role="user").content.add(text="Tell me")
        turn = await peer.send(request).read()
        assert (turn.error.reason, turn.error.code) == ("BAD_REQUEST", StatusCode.INVALID_ARGUMENT)
        assert turn.events == []

    async def test_meets_an_id_that_is_too_long(self, peer: Peer, session: str):
        turn = await peer.turn(session, "Tell me", max_tokens=1, request_id="r" * 128)
        assert turn.finished.revision_id
        before = await everything(peer, session)
        with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
            await peer.turn(session, "Tell me", max_tokens=1, request_id="r" * 129)
        assert await everything(peer, session) == before
