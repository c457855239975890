"""Damaged bytes on disk: what can be computed again is, and one damaged session disturbs no other."""

from __future__ import annotations

import pytest
from e2e_daemon import Daemons, Peer, peer_of, refused
from grpc import StatusCode

from sessiond.server import Daemon
from sessiond.storage import keys
from sessiond.v1 import admin_pb2
from sessiond.v1 import sessions_pb2 as pb

TEXT = "word " * 60  # whole cells and a tail


def damage(daemon: Daemon, key: bytes) -> None:
    """Flip a bit of a log record."""
    assert daemon.desk is not None

    def flip(txn) -> None:
        value = bytearray(txn.get(key))
        value[50] ^= 1
        txn.put(key, bytes(value))

    daemon.desk.store.log._env.submit([flip], 10).result()


def reference(daemon: Daemon, kind: str, head: str) -> bytes:
    """Key of the first cell's reference, or of the tail's."""
    assert daemon.desk is not None
    if kind == "tail":
        return keys.record_key("default", keys.TAIL_REF, head)
    (first,) = [ref for ref in daemon.desk.store.log.all_cell_refs("default") if ref.index == 0]
    return keys.cell_ref_key("default", first.prefix_hash)


@pytest.mark.parametrize("kind", ["cell", "tail"])
class TestADamagedReferenceToKV:
    async def test_is_computed_again_and_then_stored(self, peer: Peer, daemon, kind: str):
        session, twin = [(await peer.create(system="Be brief.")).session_id for _ in range(2)]
        await peer.turn(twin, TEXT, max_tokens=4)
        undisturbed = await peer.turn(twin, "And?", max_tokens=6)
        await peer.delete(twin, purge_now=True)

        await peer.turn(session, TEXT, max_tokens=4)
        await peer.settled(session)
        await peer.suspend(session)
        head = (await peer.get(session)).head_revision_id
        damage(daemon, reference(daemon, kind, head))
        assert (await peer.get(session)).persisted_upto < (await peer.get(session)).token_count - 1
        await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())
        turn = await peer.turn(session, "And?", max_tokens=6)
        assert turn.ids == undisturbed.ids
        assert {reason.reason for reason in turn.restored.reasons} == {pb.RECOMPUTE_CAUSE_CORRUPT}
        await peer.settled(session)
        await peer.suspend(session)
        assert (await peer.turn(session, "Then?", max_tokens=2)).restored.tokens_recomputed == 0

    async def test_is_written_again_by_a_session_in_memory(self, peer: Peer, daemon, kind: str):
        session = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, TEXT, max_tokens=4)
        head = (await peer.settled(session)).head_revision_id
        damage(daemon, reference(daemon, kind, head))
        await peer.turn(session, "And?", max_tokens=6)
        await peer.settled(session)
        await peer.suspend(session)
        assert (await peer.turn(session, "Then?", max_tokens=2)).restored.tokens_recomputed == 0

    async def test_is_purged_with_its_session(self, peer: Peer, daemon, kind: str):
        session = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, TEXT, max_tokens=4)
        head = (await peer.settled(session)).head_revision_id
        damage(daemon, reference(daemon, kind, head))
        await peer.delete(session, purge_now=True)
        assert daemon.desk.store.log.tenants() == []
        assert daemon.desk.store.blocks.stat().entries == 0


def record(daemon: Daemon, kind: str, session) -> bytes:
    """Key of one of a session's records that a listing or a purge reads."""
    if kind == "session":
        return keys.record_key("default", keys.SESSION, session.session_id)
    if kind == "revision":
        return keys.record_key("default", keys.REVISION, session.head_revision_id)
    if kind == "request":
        return keys.record_key("default", keys.REQUEST, session.session_id, "turn-1")
    return keys.tokens_key("default", session.head_revision_id, 0)


@pytest.mark.parametrize("kind", ["session", "revision", "request", "tokens"])
class TestADamagedSession:
    async def make_two(self, peer: Peer, daemon: Daemon, kind: str):
        """A damaged session and a whole one that share their first cells."""
        made = []
        for _ in range(2):
            session = (await peer.create(system=TEXT)).session_id
            await peer.turn(session, TEXT, max_tokens=4, request_id="turn-1")
            made.append(await peer.settled(session))
            await peer.suspend(session)
        damage(daemon, record(daemon, kind, made[0]))
        return made[0].session_id, made[1].session_id

    async def test_leaves_the_others_listed(self, peer: Peer, daemon, kind: str):
        bad, good = await self.make_two(peer, daemon, kind)
        listed = {session.session_id for session in (await peer.list()).sessions}
        assert good in listed
        assert (bad in listed) == (kind in ("request", "tokens"))
        await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())

    async def test_can_be_purged_and_takes_nothing_of_the_others(self, peer: Peer, daemon, kind: str):
        bad, good = await self.make_two(peer, daemon, kind)
        await peer.delete(bad, purge_now=True)
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await peer.get(bad)
        assert (await peer.turn(good, "And?", max_tokens=2)).restored.tokens_recomputed == 0
        await peer.delete(good, purge_now=True)
        assert daemon.desk.store.log.ids("default", keys.SESSION) == []
        for one in (bad, good):
            assert daemon.desk.store.log.ids("default", keys.REVISION_INDEX, one) == []
            assert daemon.desk.store.log.ids("default", keys.REQUEST, one) == []

    async def test_keeps_its_kv_when_another_is_purged(self, peer: Peer, daemon, kind: str):
        bad, good = await self.make_two(peer, daemon, kind)
        before = daemon.desk.store.log.all_cell_refs("default")
        await peer.delete(good, purge_now=True)
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await peer.get(good)
        assert bad in daemon.desk.store.log.ids("default", keys.SESSION)
        left = daemon.desk.store.log.all_cell_refs("default")
        assert {ref.index for ref in left} >= {ref.index for ref in before if ref.n_tokens * ref.index < 256}

    async def test_can_be_purged_after_a_restart(self, daemons: Daemons, kind: str):
        daemon = await daemons.start()
        async with peer_of(daemon.port) as peer:
            bad, good = await self.make_two(peer, daemon, kind)
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as peer:
            await peer.delete(bad, purge_now=True)
            with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
                await peer.get(bad)
            assert (await peer.turn(good, "And?", max_tokens=2)).restored.tokens_recomputed == 0


@pytest.mark.parametrize("kind", ["session", "revision", "tokens"])
class TestALossThatNothingRepairs:
    async def test_names_session_and_key_and_what_is_still_readable(self, daemons: Daemons, kind: str):
        daemon = await daemons.start()
        async with peer_of(daemon.port) as peer:
            session = await peer.create(system=TEXT)
            await peer.turn(session.session_id, "And?", max_tokens=4)
            now = await peer.get(session.session_id)
        damage(daemon, record(daemon, kind, now))
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as peer:
            with refused("RECORD_CORRUPT", StatusCode.DATA_LOSS) as caught:
                await peer.turn(session.session_id, "Then?", max_tokens=2)
        told = caught.value.metadata
        assert told["session"] == session.session_id
        assert f"/{kind}/" in told["key"]
        assert told["repairable"] == "false"
        assert told["readable"] == f"0-{now.token_count if kind == 'session' else session.token_count}"
