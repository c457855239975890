"""Forks and rollbacks: heads multiply or move, and nothing that a branch needs is lost with another."""

from __future__ import annotations

import pytest
from e2e_daemon import Daemons, Gate, Peer, peer_of, refused
from grpc import StatusCode

from sessiond.errors import DiskFull
from sessiond.v1 import admin_pb2, types_pb2
from sessiond.v1 import sessions_pb2 as pb

LONG = "word " * 70  # a whole cell and more
FIRST, SECOND, EDITED = f"{LONG} one", "And two", "No, three instead"
N = 12


async def fork(peer: Peer, session: str, revision: str = "", **fields) -> types_pb2.Session:
    request = pb.ForkSessionRequest(session_id=session, revision_id=revision, **fields)
    return await peer.call(peer.sessions.ForkSession, request)


async def rollback(peer: Peer, session: str, revision: str, **fields) -> types_pb2.Session:
    request = pb.RollbackSessionRequest(session_id=session, revision_id=revision, **fields)
    return await peer.call(peer.sessions.RollbackSession, request)


async def say(peer: Peer, session: str, *texts: str) -> list[list[int]]:
    """Turns one after the other, each settled; the tokens they generated."""
    answers = []
    for text in texts:
        answers.append((await peer.turn(session, text, max_tokens=N)).ids)
        await peer.settled(session)
    return answers


async def straight(peer: Peer, *texts: str) -> list[int]:
    """The last answer of a session that had just these turns."""
    session = (await peer.create(system="Be brief.")).session_id
    return (await say(peer, session, *texts))[-1]


async def disk(peer: Peer) -> admin_pb2.DiskUsage:
    return (await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())).disk


@pytest.fixture
async def session(peer: Peer) -> str:
    """Two turns, sealed and on disk."""
    session = (await peer.create(system="Be brief.")).session_id
    await say(peer, session, FIRST, SECOND)
    return session


class TestAFork:
    async def test_goes_on_from_the_head_without_copying_or_computing_its_past(self, peer: Peer, session: str):
        before = await disk(peer)
        branch = await fork(peer, session)
        after = await disk(peer)
        assert (after.kv_raw_bytes, after.kv_coded_bytes) == (before.kv_raw_bytes, before.kv_coded_bytes)
        whole = await peer.get(session)
        assert branch.token_count == whole.token_count
        assert branch.head_revision_id == whole.head_revision_id
        turn = await peer.turn(branch.session_id, EDITED, max_tokens=N)
        # all but the answer's last token, which was never fed
        assert turn.accepted.prompt_tokens_reused == whole.token_count - 1
        assert turn.restored.tokens_recomputed == 0
        assert turn.ids == await straight(peer, FIRST, SECOND, EDITED)

    async def test_leaves_the_other_branch_as_it_was(self, peer: Peer, session: str):
        branch = (await fork(peer, session)).session_id
        await say(peer, branch, EDITED)
        assert (await say(peer, session, "And four"))[-1] == await straight(peer, FIRST, SECOND, "And four")
        assert len(await peer.revisions(session)) == 4
        assert len(await peer.revisions(branch)) == 4

    async def test_of_an_earlier_revision_has_its_history_only(self, peer: Peer, session: str):
        first = (await peer.revisions(session))[1]
        branch = await fork(peer, session, first.revision_id)
        listed = await peer.revisions(branch.session_id)
        assert [revision.revision_id for revision in listed][-1] == first.revision_id
        assert branch.token_count == listed[-1].log_end
        turn = await peer.turn(branch.session_id, EDITED, max_tokens=N)
        assert turn.ids == await straight(peer, FIRST, EDITED)
        assert turn.restored.tokens_recomputed == 0  # the source's KV of the same tokens serves, sealed or not

    async def test_of_a_fork(self, peer: Peer, session: str):
        branch = (await fork(peer, session)).session_id
        await say(peer, branch, EDITED)
        twig = (await fork(peer, branch)).session_id
        assert (await say(peer, twig, "Go"))[-1] == await straight(peer, FIRST, SECOND, EDITED, "Go")
        assert len(await peer.revisions(twig)) == 5

    async def test_survives_a_restart(self, peer: Peer, daemon, daemons: Daemons, session: str):
        branch = (await fork(peer, session)).session_id
        expected = await straight(peer, FIRST, SECOND, EDITED)
        again = await daemons.restart(daemon)
        async with peer_of(again.port) as later:
            turn = await later.turn(branch, EDITED, max_tokens=N)
            assert turn.ids == expected
            assert turn.restored.tokens_recomputed == 0

    async def test_takes_labels_policy_and_expiry_of_its_own(self, peer: Peer, session: str):
        source = await peer.get(session)
        branch = await fork(peer, session, labels={"try": "2"}, ttl={"seconds": 60})
        assert dict(branch.labels) == {"try": "2"}
        assert branch.ttl.seconds == 60
        assert branch.policy == source.policy
        assert branch.session_id != session

    async def test_with_the_same_request_id_is_made_once(self, peer: Peer, session: str):
        first = await fork(peer, session, request_id="fork-1")
        await say(peer, first.session_id, EDITED)
        again = await fork(peer, session, request_id="fork-1")
        assert again.session_id == first.session_id
        assert again.token_count > first.token_count
        with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
            await fork(peer, session, request_id="fork-1", labels={"a": "b"})

    async def test_of_what_is_not_there_is_refused(self, peer: Peer, session: str):
        other = (await peer.create(system="Another")).session_id
        foreign = (await peer.get(other)).head_revision_id
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await fork(peer, "nobody")
        for revision in ("nothing", foreign):
            with refused("REVISION_NOT_FOUND", StatusCode.NOT_FOUND):
                await fork(peer, session, revision)
        with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
            await fork(peer, session, model="another")
        with refused("UNKNOWN_POLICY", StatusCode.INVALID_ARGUMENT):
            await fork(peer, session, policy=types_pb2.Policy(name="no such"))
        await peer.delete(session)
        with refused("SESSION_DELETED", StatusCode.FAILED_PRECONDITION):
            await fork(peer, session)
        assert len((await peer.list()).sessions) == 1


class TestPurging:
    @pytest.mark.parametrize("first", [0, 1])
    async def test_one_branch_never_harms_the_other_and_both_leave_nothing(self, peer: Peer, session: str, first: int):
        branch = (await fork(peer, session)).session_id
        await say(peer, branch, EDITED)
        gone, kept = [session, branch] if first == 0 else [branch, session]
        last, texts = ("Go", [FIRST, SECOND, EDITED, "Go"]) if kept == branch else ("Go", [FIRST, SECOND, "Go"])
        expected = await straight(peer, *texts)
        await peer.suspend(kept)
        await peer.delete(gone, purge_now=True)
        turn = await peer.turn(kept, last, max_tokens=N)
        assert turn.ids == expected
        assert turn.restored.tokens_recomputed == 0
        for left in [s.session_id for s in (await peer.list()).sessions]:
            await peer.settled(left)
            await peer.delete(left, purge_now=True)
        now = await disk(peer)
        assert (now.kv_raw_bytes, now.kv_coded_bytes) == (0, 0)

    async def test_a_branch_that_was_rolled_back_is_kept_for_who_shares_it(self, peer: Peer, session: str):
        """The fork's head stands before the fork; what it can return to belongs to a session that is purged."""
        root, first, second = [revision.revision_id for revision in await peer.revisions(session)]
        branch = (await fork(peer, session)).session_id
        await rollback(peer, branch, first)
        await peer.delete(session, purge_now=True)
        await rollback(peer, branch, second)
        assert (await say(peer, branch, EDITED))[-1] == await straight(peer, FIRST, SECOND, EDITED)
        assert [revision.revision_id for revision in await peer.revisions(branch)][:3] == [root, first, second]


class TestARollback:
    async def test_then_a_turn_computes_only_the_new_tokens(self, peer: Peer, session: str):
        first = (await peer.revisions(session))[1]
        back = await rollback(peer, session, first.revision_id)
        assert (back.head_revision_id, back.token_count) == (first.revision_id, first.log_end)
        turn = await peer.turn(session, EDITED, max_tokens=N)
        assert turn.ids == await straight(peer, FIRST, EDITED)
        assert turn.accepted.prompt_tokens_reused >= first.log_end - 1
        assert "restored" not in turn.kinds

    async def test_after_a_restart_recomputes_nothing(self, peer: Peer, daemon, daemons: Daemons, session: str):
        first = (await peer.revisions(session))[1]
        expected = await straight(peer, FIRST, EDITED)
        again = await daemons.restart(daemon)
        async with peer_of(again.port) as later:
            await rollback(later, session, first.revision_id)
            turn = await later.turn(session, EDITED, max_tokens=N)
            assert turn.ids == expected
            assert turn.restored.tokens_recomputed == 0
            # not the answer's last token: only the branch that was left had fed it, in a step of other shapes
            assert turn.accepted.prompt_tokens_reused == first.log_end - 1

    async def test_leaves_later_revisions_to_return_to(self, peer: Peer, session: str):
        _, first, second = [revision.revision_id for revision in await peer.revisions(session)]
        await rollback(peer, session, first)
        await say(peer, session, EDITED)
        assert len(await peer.revisions(session)) == 4
        await rollback(peer, session, second)
        assert (await say(peer, session, "Go"))[-1] == await straight(peer, FIRST, SECOND, "Go")
        branch = (await fork(peer, session, first)).session_id
        assert (await say(peer, branch, EDITED))[-1] == await straight(peer, FIRST, EDITED)

    async def test_gives_up_a_suspended_turn(self, peer: Peer, daemon, session: str):
        first = (await peer.revisions(session))[1].revision_id
        daemon.desk.settings = daemon.desk.settings.model_copy(update={"detached_turn_seconds": 0.0})
        gate = Gate(daemon)
        stream = peer.open(session, EDITED, max_tokens=40, request_id="turn-3")
        gate.let(4)
        await stream.read_tokens(3)
        stream.cancel()
        await gate.cancelled()
        gate.open()
        while not (now := await peer.get(session)).suspended_request_id:
            assert now.running_request_id
        now = await rollback(peer, session, first)
        assert (now.suspended_request_id, now.head_revision_id) == ("", first)
        assert (await say(peer, session, EDITED))[-1] == await straight(peer, FIRST, EDITED)

    async def test_that_fails_leaves_the_suspended_turn(self, peer: Peer, daemon, session: str, monkeypatch):
        """One transaction: the turn is given up with the head that moves, or neither."""
        first = (await peer.revisions(session))[1].revision_id
        daemon.desk.settings = daemon.desk.settings.model_copy(update={"detached_turn_seconds": 0.0})
        gate = Gate(daemon)
        stream = peer.open(session, EDITED, max_tokens=40, request_id="turn-3")
        gate.let(4)
        await stream.read_tokens(3)
        stream.cancel()
        await gate.cancelled()
        gate.open()
        while not (now := await peer.get(session)).suspended_request_id:
            assert now.running_request_id
        write, writes = daemon.desk.store.log.write, []

        def full_at_the_second(batch):
            writes.append(batch)
            if len(writes) == 1:
                raise DiskFull("no space")
            return write(batch)

        monkeypatch.setattr(daemon.desk.store.log, "write", full_at_the_second)
        with refused("DISK_FULL", StatusCode.RESOURCE_EXHAUSTED):
            await rollback(peer, session, first)
        assert len(writes) == 1
        rest = await peer.turn(session, EDITED, max_tokens=40, request_id="turn-3")
        assert len(rest.ids) == 40

    async def test_while_a_turn_runs_is_refused(self, peer: Peer, daemon, session: str):
        first = (await peer.revisions(session))[1].revision_id
        gate = Gate(daemon)
        stream = peer.open(session, EDITED, max_tokens=4)
        gate.let(1)
        await stream.read_tokens(1)
        with refused("SESSION_BUSY", StatusCode.ABORTED):
            await rollback(peer, session, first)
        gate.open()
        await stream.read()

    async def test_with_the_same_request_id_moves_the_head_once(self, peer: Peer, session: str):
        first = (await peer.revisions(session))[1].revision_id
        await rollback(peer, session, first, request_id="back")
        await say(peer, session, EDITED)
        now = await rollback(peer, session, first, request_id="back")
        assert now.head_revision_id == (await peer.revisions(session))[-1].revision_id
        with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
            await rollback(peer, session, now.head_revision_id, request_id="back")
        with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
            await peer.turn(session, EDITED, max_tokens=1, request_id="back")

    async def test_of_what_is_not_there_or_has_changed_is_refused(self, peer: Peer, session: str):
        first = (await peer.revisions(session))[1].revision_id
        foreign = (await peer.create(system="Another")).head_revision_id
        before = await peer.get(session)
        for revision in ("nothing", foreign):
            with refused("REVISION_NOT_FOUND", StatusCode.NOT_FOUND):
                await rollback(peer, session, revision)
        with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
            await rollback(peer, session, "")
        with refused("ETAG_MISMATCH", StatusCode.ABORTED):
            await rollback(peer, session, first, etag="99")
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await rollback(peer, "nobody", first)
        assert (await peer.get(session)).head_revision_id == before.head_revision_id


class TestAnIdUsedAgain:
    async def test_after_a_purge_makes_a_session_that_knows_nothing_of_the_old_one(self, peer: Peer):
        """The old one's revisions are still there, for its fork."""
        gone = (await peer.create(system="Be brief.", request_id="again")).session_id
        await say(peer, gone, FIRST)
        kept = (await fork(peer, gone)).session_id
        old = (await peer.get(gone)).head_revision_id
        await peer.delete(gone, purge_now=True)
        new = await peer.create(system="Be brief.", request_id="again")
        assert [revision.revision_id for revision in await peer.revisions(new.session_id)] == [new.head_revision_id]
        with refused("REVISION_NOT_FOUND", StatusCode.NOT_FOUND):
            await rollback(peer, new.session_id, old)
        with refused("REVISION_NOT_FOUND", StatusCode.NOT_FOUND):
            await fork(peer, new.session_id, old)
        assert len(await peer.revisions(kept)) == 2
