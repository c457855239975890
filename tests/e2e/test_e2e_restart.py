"""A daemon that stops, or dies: the conversation goes on as if it had not."""

from __future__ import annotations

import asyncio

import lmdb
import pytest
from e2e_daemon import PATIENCE, Daemons, Peer, Process, Turn, peer_of, recorded, refused
from e2e_model import NO_END, write_chat_model
from grpc import StatusCode

from sessiond.clients import AsyncClient
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2

# Long enough for whole cells and a tail beyond them.
LONG = 40
TEXTS = ["word " * 70, "And a little more", "The last question"]
SAMPLINGS = [{}, {"temperature": 3.0, "seed": 7, "logit_bias": NO_END}]


async def converse(peer: Peer, session: str, texts: list[str], **options) -> list[Turn]:
    """Turns, each begun only when the one before is sealed and on disk, as a person's would be."""
    turns = []
    for text in texts:
        turns.append(await peer.turn(session, text, max_tokens=LONG, **options))
        await peer.settled(session)
    return turns


async def never_interrupted(daemons: Daemons, tmp_path, texts=TEXTS, **options) -> list[Turn]:
    """The conversation in a daemon that nothing happens to."""
    daemon = await daemons.start(data_dir=tmp_path / "undisturbed")
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        turns = await converse(peer, session, texts, **options)
    await daemons.stop(daemon)
    return turns


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
class TestBetweenTurns:
    async def test_a_clean_stop_recomputes_nothing(self, daemons: Daemons, tmp_path, sampling):
        whole = await never_interrupted(daemons, tmp_path, **sampling)
        daemon = await daemons.start()
        async with peer_of(daemon.port) as peer:
            session = (await peer.create(system="Be brief.")).session_id
            turns = await converse(peer, session, TEXTS[:2], **sampling)
            before = await peer.get(session)
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as peer:
            after = await peer.get(session)
            assert after.tier == types_pb2.TIER_COLD
            assert recorded(after) == recorded(before)
            assert after.persisted_upto == before.persisted_upto
            assert after.exact_upto == before.exact_upto
            turn = await peer.turn(session, TEXTS[2], max_tokens=LONG, **sampling)
        assert turn.kinds[:2] == ["accepted", "restored"]
        assert turn.restored.tokens_recomputed == 0
        assert not turn.restored.reasons
        assert turn.restored.tokens_restored == turn.accepted.prompt_tokens_reused == before.token_count - 1
        assert turn.restored.bytes_read > 0
        assert [t.ids for t in [*turns, turn]] == [t.ids for t in whole]

    async def test_a_stop_right_after_a_turn_recomputes_nothing(self, daemons: Daemons, tmp_path, sampling):
        daemon = await daemons.start()
        async with peer_of(daemon.port) as peer:
            session = (await peer.create(system="Be brief.")).session_id
            turn = await peer.turn(session, TEXTS[0], max_tokens=LONG, **sampling)
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as peer:
            then = await peer.turn(session, TEXTS[1], max_tokens=LONG, **sampling)
        assert then.restored.tokens_recomputed == 0
        assert then.restored.tokens_restored == turn.finished.committed_tokens - 1

    async def test_a_kill_after_all_was_persisted_recomputes_nothing(self, spawn, daemons: Daemons, tmp_path, sampling):
        whole = await never_interrupted(daemons, tmp_path, **sampling)
        process = spawn()
        async with peer_of(process.port) as peer:
            session = (await peer.create(system="Be brief.")).session_id
            turns = await converse(peer, session, TEXTS[:2], **sampling)
            before = await peer.get(session)
            process.kill()
        process = spawn()
        async with peer_of(process.port) as peer:
            after = await peer.get(session)
            assert recorded(after) == recorded(before)
            turn = await peer.turn(session, TEXTS[2], max_tokens=LONG, **sampling)
        assert turn.restored.tokens_recomputed == 0
        assert turn.restored.tokens_restored == before.token_count - 1
        assert [t.ids for t in [*turns, turn]] == [t.ids for t in whole]


async def test_a_kill_right_after_finished_loses_no_token(spawn):
    process = spawn()
    async with peer_of(process.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        turn = await peer.turn(session, TEXTS[0], max_tokens=LONG, request_id="turn-1")
        process.kill()
    process = spawn()
    async with peer_of(process.port) as peer:
        now = await peer.get(session)
        assert now.head_revision_id == turn.finished.revision_id
        assert now.token_count == turn.finished.committed_tokens
        replay = await peer.turn(session, TEXTS[0], max_tokens=LONG, request_id="turn-1")
        assert (replay.accepted.attachment, replay.ids) == (pb.ATTACHMENT_REPLAYED, turn.ids)
        then = await peer.turn(session, TEXTS[1], max_tokens=LONG)
        lost = then.restored.tokens_recomputed if "restored" in then.kinds else 0
        assert sum(reason.tokens for reason in then.restored.reasons) == lost
        assert all(reason.reason == pb.RECOMPUTE_CAUSE_NOT_PERSISTED for reason in then.restored.reasons)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
@pytest.mark.parametrize("seen", [0, 30])
async def test_a_turn_cut_off_by_a_kill_goes_on_where_it_stood(spawn, daemons, tmp_path, sampling, seen: int):
    """The client comes back with its request_id and gets the rest; nothing shows that anything happened."""
    before, whole, after = await never_interrupted(daemons, tmp_path, [TEXTS[0], "Tell me", "And?"], **sampling)
    process = spawn()
    async with peer_of(process.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        assert (await converse(peer, session, TEXTS[:1], **sampling))[0].ids == before.ids
        process.hold(seen)
        stream = peer.open(session, "Tell me", max_tokens=LONG, request_id="turn-1", **sampling)
        await stream.read(lambda turn: "accepted" in turn.kinds and len(turn.ids) >= seen)
        process.kill()
        first = await stream.read()
        assert first.error is not None
        assert first.error.code is StatusCode.UNAVAILABLE
        assert len(first.ids) == seen
    process.release()
    process = spawn()
    async with peer_of(process.port) as peer:
        assert (await peer.get(session)).suspended_request_id == "turn-1"
        rest = await peer.turn(
            session, "Tell me", max_tokens=LONG, request_id="turn-1", resume_after_tokens=seen, **sampling
        )
        assert rest.accepted.attachment == pb.ATTACHMENT_RESUMED
        again = [r.tokens for r in rest.restored.reasons if r.reason == pb.RECOMPUTE_CAUSE_INTERRUPTED_TURN]
        # the prompt, and all logged tokens but the last; of a turn without tokens nobody knows how far it was
        assert len(again) == (1 if seen else 0)
        assert not seen or again[0] > seen
        assert rest.restored.tokens_recomputed == sum(reason.tokens for reason in rest.restored.reasons)
        assert first.ids + rest.ids == whole.ids
        assert first.text + rest.text == whole.text == rest.answer
        assert rest.finished.usage.generated_tokens == whole.finished.usage.generated_tokens
        await peer.settled(session)
        assert (await peer.turn(session, "And?", max_tokens=LONG, **sampling)).ids == after.ids


async def test_the_client_survives_a_kill_by_itself(spawn):
    """`sessiond.clients` comes back on its own: the caller's loop sees one answer, without a gap or repetition."""
    process = spawn()
    async with AsyncClient(f"localhost:{process.port}") as client:
        undisturbed = await client.create_session(system="Be brief.")
        whole = [event async for event in undisturbed.generate("Tell me", max_tokens=LONG)]
        session = await client.create_session(system="Be brief.")
        seen, killed = [], False
        process.hold(12)
        async with asyncio.timeout(PATIENCE):
            async for event in session.generate("Tell me", max_tokens=LONG):
                seen.append(event)
                if not killed and event.token_ids and event.proto.token.first_token_index >= 10:
                    killed = True
                    process.kill()
                    process.release()
                    await asyncio.to_thread(spawn, listen=f"127.0.0.1:{process.port}")
    assert [t for event in seen for t in event.token_ids] == [t for event in whole for t in event.token_ids]
    assert "".join(event.text for event in seen) == "".join(event.text for event in whole)
    assert seen[-1].kind == "finished"


async def test_sessions_and_labels_survive_a_kill(spawn):
    process = spawn()
    async with peer_of(process.port) as peer:
        made = [await peer.create(system="Be brief.", labels={"n": str(i)}) for i in range(3)]
        deleted = (await peer.delete(made[1].session_id)).session
        process.kill()
    process = spawn()
    async with peer_of(process.port) as peer:
        for session in (made[0], deleted, made[2]):
            assert await peer.get(session.session_id) == session
        listed = (await peer.list(show_deleted=True)).sessions
        assert {session.session_id for session in listed} == {session.session_id for session in made}
        found = (await peer.list(filter='labels.n = "2"')).sessions
        assert [session.session_id for session in found] == [made[2].session_id]


async def test_damaged_kv_is_computed_again_from_the_log(spawn, daemons: Daemons, settings):
    """A flipped byte in a KV record costs time, not truth."""
    daemon = await daemons.start()
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        undisturbed = (await peer.create(system="Be brief.")).session_id
        for one in (session, undisturbed):
            await converse(peer, one, TEXTS[:2])
        expected = await peer.turn(undisturbed, TEXTS[2], max_tokens=LONG)
        await peer.delete(undisturbed, purge_now=True)
        await peer.suspend(session)
    await daemons.stop(daemon)
    path = settings["data_dir"] / "blocks" / "data.mdb"
    damage(path)
    daemon = await daemons.start()
    async with peer_of(daemon.port) as peer:
        turn = await peer.turn(session, TEXTS[2], max_tokens=LONG)
    assert turn.ids == expected.ids
    assert turn.restored.tokens_recomputed > 0
    assert {reason.reason for reason in turn.restored.reasons} == {pb.RECOMPUTE_CAUSE_CORRUPT}
    assert sum(reason.tokens for reason in turn.restored.reasons) == turn.restored.tokens_recomputed


def damage(path) -> None:
    """Flip one byte in the middle of every page run that looks like a KV record's payload."""
    with lmdb.open(str(path.parent), map_size=1 << 30, lib_version=0) as env, env.begin(write=True) as txn:
        cursor = txn.cursor()
        for key, value in list(cursor):
            raw = bytearray(value)
            raw[len(raw) * 3 // 4] ^= 0x40
            txn.put(key, bytes(raw))


async def test_a_session_of_another_model_is_refused_by_name(daemons: Daemons, tmp_path):
    daemon = await daemons.start()
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, TEXTS[0], max_tokens=4)
        before = await peer.settled(session)
        assert before.exact_upto > 0
    other = write_chat_model(tmp_path / "other", seed=1)
    daemon = await daemons.restart(daemon, model=str(other))
    async with peer_of(daemon.port) as peer:
        for attempt in (lambda: peer.turn(session, "Tell me", max_tokens=2), lambda: peer.warm(session)):
            with refused("IDENTITY_MISMATCH", StatusCode.FAILED_PRECONDITION) as error:
                await attempt()
            assert "weights" in error.value.metadata["field"]
        assert recorded(await peer.get(session)) == recorded(before)
        with refused("IDENTITY_MISMATCH", StatusCode.FAILED_PRECONDITION):
            await peer.count(session, "Tell me")
        # Reading, labelling and deleting need no model.
        assert len(await peer.revisions(session)) == 2
        assert (await peer.delete(session, purge_now=True)).freed_bytes > 0
        assert daemon.desk.store.log.all_cell_refs("default") == []
        assert daemon.desk.store.blocks.stat().entries == 0


async def test_a_spawned_daemon_stops_when_told(spawn):
    process: Process = spawn()
    process.terminate()
    assert await process.exit_code() == 0
