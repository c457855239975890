"""Where a session's KV is: hot, on disk, and back again; under a budget, after idleness, at the end of its time."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from e2e_daemon import PATIENCE, Daemons, Gate, Peer, everything, peer_of, recorded, refused
from grpc import StatusCode

from sessiond.clients.errors import NotFoundError
from sessiond.errors import DiskFull
from sessiond.v1 import admin_pb2, types_pb2
from sessiond.v1 import sessions_pb2 as pb

KV_BYTES = 2 * 2 * 2 * 8 * 4  # K and V, layers, KV heads, head size, float32
LONG_TEXT = "word " * 60


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110 - another party's doing
            await asyncio.sleep(0.02)


class TestWarmAndSuspend:
    async def test_a_new_session_is_cold(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        assert session.tier == types_pb2.TIER_COLD
        assert session.token_count > 0
        assert (session.exact_upto, session.persisted_upto, session.bytes_hot) == (0, 0, 0)

    async def test_a_turn_makes_it_hot_and_what_it_computed_sealed_and_persisted(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        turn = await peer.turn(session.session_id, LONG_TEXT, max_tokens=8)
        now = await peer.settled(session.session_id)
        count = turn.finished.committed_tokens
        assert now.tier == types_pb2.TIER_HOT
        assert now.token_count == count
        assert now.exact_upto == count // 128 * 128
        assert now.persisted_upto == count - 1
        assert now.bytes_hot == (count - 1) * KV_BYTES

    async def test_suspending_frees_the_memory_and_keeps_the_rest(self, peer: Peer):
        session = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, LONG_TEXT, max_tokens=8)
        hot = await peer.settled(session)
        done = await peer.suspend(session)
        assert done.bytes_freed == hot.bytes_hot
        assert done.session.tier == types_pb2.TIER_COLD
        assert done.session.bytes_hot == 0
        assert done.session.exact_upto == hot.exact_upto
        assert done.session.persisted_upto == hot.persisted_upto
        assert recorded(done.session) == recorded(hot)
        again = await peer.suspend(session)
        assert (again.bytes_written, again.bytes_freed) == (0, 0)

    async def test_suspending_right_after_a_turn_writes_what_is_not_yet_written(self, peer: Peer):
        session = (await peer.create(system="Be brief.")).session_id
        turn = await peer.turn(session, LONG_TEXT, max_tokens=8)
        done = await peer.suspend(session)
        assert done.session.persisted_upto == turn.finished.committed_tokens - 1
        then = await peer.turn(session, "And?", max_tokens=4)
        assert then.restored.tokens_restored == turn.finished.committed_tokens - 1
        assert then.restored.tokens_recomputed == 0

    async def test_warming_brings_it_back_ahead_of_the_turn(self, peer: Peer):
        session = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, LONG_TEXT, max_tokens=8)
        hot = await peer.settled(session)
        await peer.suspend(session)
        warmed = await peer.warm(session)
        assert warmed.session.tier == types_pb2.TIER_HOT
        assert warmed.session.bytes_hot == hot.bytes_hot
        assert warmed.restored.tokens_restored == hot.token_count - 1
        assert warmed.restored.bytes_read > 0
        assert warmed.restored.tokens_recomputed == 0
        assert not (await peer.warm(session)).HasField("restored")
        then = await peer.turn(session, "And?", max_tokens=4)
        assert "restored" not in then.kinds
        assert then.accepted.prompt_tokens_reused == hot.token_count - 1

    async def test_going_through_disk_changes_no_answer(self, peer: Peer):
        sessions = [(await peer.create(system="Be brief.")).session_id for _ in range(2)]
        answers = {}
        for session in sessions:
            answers[session] = []
            for text in (LONG_TEXT, "More", "And more"):
                answers[session].append((await peer.turn(session, text, max_tokens=20)).ids)
                await peer.settled(session)
                if session == sessions[1]:
                    await peer.suspend(session)
        assert answers[sessions[0]] == answers[sessions[1]]

    async def test_equal_beginnings_are_stored_once(self, peer: Peer, daemon):
        one, two = [(await peer.create(system="Be brief.")).session_id for _ in range(2)]
        for session in (one, two):
            await peer.turn(session, LONG_TEXT, max_tokens=8)
            await peer.settled(session)
        (cells,) = [daemon.desk.store.log.all_cell_refs("default")]
        assert len(cells) == (await peer.get(one)).exact_upto // 128
        # And erasing one leaves the other whole.
        await peer.delete(one, purge_now=True)
        await peer.suspend(two)
        then = await peer.turn(two, "And?", max_tokens=4)
        assert then.restored.tokens_recomputed == 0

    async def test_a_session_with_a_running_turn_is_busy(self, peer: Peer, daemon):
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=3)
        await gate.reached()
        try:
            for attempt in (peer.suspend, peer.warm):
                with refused("SESSION_BUSY", StatusCode.ABORTED):
                    async with asyncio.timeout(5):
                        await attempt(session)
        finally:
            gate.open()
            await stream.read()


class TestTheBudget:
    TEXT = "word " * 180  # 900 tokens and 236 KB of KV: four fit into the smallest budget, 1 MiB

    @pytest.fixture
    async def daemon(self, daemons: Daemons):
        return await daemons.start(memory_budget_bytes=1 << 20)

    async def test_pushes_out_the_least_recently_used(self, peer: Peer):
        sessions = [(await peer.create(system=f"Number {i}.")).session_id for i in range(12)]
        counts = {}
        for session in sessions:
            counts[session] = (await peer.turn(session, self.TEXT, max_tokens=2)).finished.committed_tokens
            stats = await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())
            assert sum(stats.memory_bytes_by_tier.values()) <= 1 << 20
        tiers = [(await peer.get(session)).tier for session in sessions]
        n_hot = tiers.count(types_pb2.TIER_HOT)
        assert 0 < n_hot < 12
        assert tiers == [types_pb2.TIER_COLD] * (12 - n_hot) + [types_pb2.TIER_HOT] * n_hot
        # The oldest comes back whole.
        then = await peer.turn(sessions[0], "And?", max_tokens=2)
        assert then.restored.tokens_recomputed == 0
        assert then.accepted.prompt_tokens_reused == counts[sessions[0]] - 1

    async def test_a_session_that_cannot_leave_fails_no_turn_of_another(self, peer: Peer, daemon, monkeypatch):
        sessions = [(await peer.create(system=f"Number {i}.")).session_id for i in range(6)]
        suspend, asked = daemon.desk.suspend, []

        async def refuse(live):
            asked.append(live.session_id)
            if live.session_id == sessions[0]:
                raise DiskFull("no space")
            return await suspend(live)

        monkeypatch.setattr(daemon.desk, "suspend", refuse)
        for session in sessions:
            assert (await peer.turn(session, self.TEXT, max_tokens=2)).finished.revision_id
        assert sessions[0] in asked
        tiers = [(await peer.get(session)).tier for session in sessions]
        assert tiers[:2] == [types_pb2.TIER_HOT, types_pb2.TIER_COLD]

    async def test_refuses_what_does_not_fit_beside_running_turns(self, peer: Peer, daemon):
        sessions = [(await peer.create(system=f"Number {i}.")).session_id for i in range(4)]
        for session in sessions:
            await peer.turn(session, self.TEXT, max_tokens=2)
            await peer.suspend(session)
        last = await peer.create(token_ids=[10] * 1000)
        gate = Gate(daemon)
        streams = [peer.open(session, "And?", max_tokens=2) for session in sessions]
        for stream in streams:
            assert (await stream.read(lambda turn: "accepted" in turn.kinds)).error is None
        before = await everything(peer, last.session_id)
        with refused("MEMORY_BUDGET", StatusCode.RESOURCE_EXHAUSTED) as error:
            await peer.turn(last.session_id, token_ids=[1], max_tokens=2, request_id="turn-1")
        assert error.value.retry_after
        assert int(error.value.metadata["budget_bytes"]) == 1 << 20
        assert await everything(peer, last.session_id) == before
        gate.open()
        for stream in streams:
            assert (await stream.read()).finished.revision_id
        # Nothing of the refused turn is left, and there is room now.
        turn = await peer.turn(last.session_id, token_ids=[1], max_tokens=2, request_id="turn-1")
        assert turn.accepted.attachment == pb.ATTACHMENT_STARTED


class TestTime:
    async def test_an_idle_session_leaves_memory_and_returns(self, daemons: Daemons):
        daemon = await daemons.start(idle_seconds=0.1, sweep_seconds=0.05)
        async with peer_of(daemon.port) as peer:
            session = (await peer.create(system="Be brief.")).session_id
            turn = await peer.turn(session, LONG_TEXT, max_tokens=8)

            async def cold() -> bool:
                return (await peer.get(session)).tier == types_pb2.TIER_COLD

            await until(cold)
            now = await peer.get(session)
            assert now.persisted_upto == turn.finished.committed_tokens - 1
            assert not daemon.desk.lives
            then = await peer.turn(session, "And?", max_tokens=4)
            assert then.restored.tokens_recomputed == 0
            assert then.accepted.prompt_tokens_reused == turn.finished.committed_tokens - 1

    @pytest.mark.parametrize("error", [DiskFull("no space"), ZeroDivisionError("a bug")], ids=["disk", "bug"])
    async def test_a_session_that_cannot_leave_keeps_no_other_from_it(self, daemons: Daemons, monkeypatch, error):
        """Neither when they are idle nor when the daemon stops."""
        daemon = await daemons.start(idle_seconds=0.1, sweep_seconds=0.05, settle_seconds=600)
        async with peer_of(daemon.port) as peer:
            bad, good, late = [(await peer.create(system="Be brief.")).session_id for _ in range(3)]
            suspend = daemon.desk.suspend

            async def refuse(live):
                if live.session_id == bad:
                    raise error
                return await suspend(live)

            monkeypatch.setattr(daemon.desk, "suspend", refuse)
            for session in (bad, good):
                await peer.turn(session, LONG_TEXT, max_tokens=2)

            async def cold() -> bool:
                return (await peer.get(good)).tier == types_pb2.TIER_COLD

            await until(cold)
            assert (await peer.get(bad)).tier == types_pb2.TIER_HOT
            turn = await peer.turn(late, LONG_TEXT, max_tokens=2)
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as peer:
            assert (await peer.get(late)).persisted_upto == turn.finished.committed_tokens - 1

    async def test_a_running_turn_is_not_idle(self, daemons: Daemons):
        daemon = await daemons.start(idle_seconds=0.05, sweep_seconds=0.02)
        async with peer_of(daemon.port) as peer:
            session = (await peer.create(system="Be brief.")).session_id
            gate = Gate(daemon)
            gate.let(3)
            stream = peer.open(session, "Tell me", max_tokens=6)
            await stream.read_tokens(3)
            await asyncio.sleep(0.3)
            gate.open()
            assert len((await stream.read()).ids) == 6

    async def test_an_expired_session_is_deleted_then_purged(self, daemons: Daemons):
        daemon = await daemons.start(sweep_seconds=0.05, delete_retention_seconds=200)
        clock, ahead = daemon.desk.now_us, timedelta()
        daemon.desk.now_us = lambda: clock() + ahead // timedelta(microseconds=1)
        async with peer_of(daemon.port) as peer:
            session = await peer.create(system="Be brief.", ttl=300)
            assert session.ttl.ToSeconds() == 300
            assert session.expire_time.ToDatetime(UTC) > session.create_time.ToDatetime(UTC)

            async def deleted() -> bool:
                return (await peer.get(session.session_id)).state == types_pb2.SESSION_STATE_DELETED

            ahead = timedelta(seconds=301)
            await until(deleted)
            now = await peer.get(session.session_id)
            kept = now.purge_time.ToDatetime() - now.delete_time.ToDatetime()
            assert kept == timedelta(seconds=200)

            async def gone() -> bool:
                with contextlib.suppress(NotFoundError):
                    await peer.get(session.session_id)
                    return False
                return True

            ahead += kept
            await until(gone)
            with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
                await peer.get(session.session_id)
            assert daemon.desk.store.log.revisions_of_session("default", session.session_id) == []

    async def test_every_turn_moves_a_ttl_and_none_moves_a_fixed_time(self, peer: Peer):
        moving = await peer.create(system="Be brief.", ttl=100)
        fixed = await peer.create(system="Be brief.", expire_time=datetime.now(UTC) + timedelta(seconds=100))
        for session in (moving, fixed):
            await peer.turn(session.session_id, "Tell me", max_tokens=2)
        assert (await peer.get(moving.session_id)).expire_time.ToDatetime() > moving.expire_time.ToDatetime()
        assert (await peer.get(fixed.session_id)).expire_time == fixed.expire_time

    async def test_a_deleted_session_takes_no_turns_until_it_is_brought_back(self, peer: Peer):
        session = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, LONG_TEXT, max_tokens=4)
        before = await peer.settled(session)
        gone = (await peer.delete(session)).session
        assert gone.state == types_pb2.SESSION_STATE_DELETED
        assert gone.HasField("purge_time")
        for attempt in (
            lambda: peer.turn(session, "And?", max_tokens=2),
            lambda: peer.warm(session),
            lambda: peer.count(session, "Hi"),
        ):
            with refused("SESSION_DELETED", StatusCode.FAILED_PRECONDITION):
                await attempt()
        with refused("SESSION_DELETED", StatusCode.FAILED_PRECONDITION):
            await peer.update(types_pb2.Session(session_id=session, labels={"a": "b"}))
        assert (await peer.delete(session)).session == gone
        back = await peer.undelete(session)
        assert back.state == types_pb2.SESSION_STATE_ACTIVE
        assert not back.HasField("purge_time")
        assert back.head_revision_id == before.head_revision_id
        then = await peer.turn(session, "And?", max_tokens=2)
        assert then.restored.tokens_recomputed == 0
        with refused("NOT_DELETED", StatusCode.FAILED_PRECONDITION):
            await peer.undelete(session)

    async def test_purging_now_erases_every_record(self, peer: Peer, daemon):
        session = (await peer.create(system="Be brief.")).session_id
        turn = await peer.turn(session, LONG_TEXT, max_tokens=4, request_id="turn-1")
        await peer.settled(session)
        log, blocks = daemon.desk.store.log, daemon.desk.store.blocks
        assert log.all_cell_refs("default")
        assert blocks.stat().entries > 0
        answer = await peer.delete(session, purge_now=True)
        assert answer.freed_bytes > 0
        assert not answer.HasField("session")
        for attempt in (peer.get, peer.revisions, peer.delete, peer.undelete):
            with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
                await attempt(session)
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await peer.turn(session, LONG_TEXT, max_tokens=4, request_id="turn-1")
        assert log.revisions_of_session("default", session) == []
        assert log.requests("default", session) == []
        assert log.tokens("default", turn.finished.revision_id)[0].tolist() == []
        assert log.messages("default", turn.finished.revision_id) is None
        assert log.tail_ref("default", turn.finished.revision_id) is None
        assert log.all_cell_refs("default") == []
        assert blocks.stat().entries == 0

        async def unlisted() -> bool:
            return not (await peer.list(show_deleted=True)).sessions

        await until(unlisted)

    async def test_a_session_with_a_running_turn_is_not_deleted(self, peer: Peer, daemon):
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=3)
        await gate.reached()
        with refused("SESSION_BUSY", StatusCode.ABORTED):  # at once: the turn cannot end before the gate opens
            await peer.delete(session)
        gate.open()
        assert (await stream.read()).finished.revision_id
