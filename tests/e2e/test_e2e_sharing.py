"""What one session has computed serves another that begins with the same tokens: inside the tenant, never across."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import numpy as np
import pytest
from e2e_daemon import PATIENCE, Daemons, Gate, Peer, peer_of, refused
from grpc import StatusCode
from small_policies import SMALL
from test_e2e_branches import fork, rollback, say

from sessiond import tiers
from sessiond.errors import RecordCorrupt
from sessiond.server import Daemon
from sessiond.storage.batch import LogBatch
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2

CELL = 128
DOCUMENT = "word " * 100  # almost four cells
N = 8


async def ask(peer: Peer, question: str, document: str = DOCUMENT, system: str = "Be brief.") -> tuple[str, Any]:
    """A new session, and its first turn: a document and a question."""
    session = (await peer.create(system=system)).session_id
    return session, await peer.turn(session, f"{document}\n{question}", max_tokens=N)


async def alone(daemons: Daemons, question: str, **changes: Any) -> list[int]:
    """The answer of a daemon that has nothing to share."""
    daemon = await daemons.start(data_dir=daemons.settings["data_dir"].with_name("alone"), **changes)
    async with peer_of(daemon.port) as peer:
        ids = (await ask(peer, question))[1].ids
    await daemons.stop(daemon)
    return ids


def cache_bytes(daemon: Daemon, session: str, upto: int) -> list[bytes]:
    cache = daemon.desk.lives["default", session].cache
    return [part[:, :upto].tobytes() for layer in range(cache.shape.n_layers) for part in
            (cache._raw[layer, 0], cache._raw[layer, 1])]  # fmt: skip


class TestASecondSession:
    async def test_computes_at_most_one_cell_of_a_document_that_another_holds_in_memory(self, daemons: Daemons):
        daemon = await daemons.start(settle_seconds=600)  # nothing reaches the disk
        async with peer_of(daemon.port) as peer:
            first, _ = await ask(peer, "Who?")
            second, again = await ask(peer, "What?")
            new, reused = again.accepted.prompt_tokens_new, again.accepted.prompt_tokens_reused
            assert new <= CELL
            assert reused == (new + reused) // CELL * CELL
            assert again.restored.tokens_restored == reused
            assert again.restored.tier == types_pb2.TIER_HOT
            assert (again.restored.bytes_read, again.restored.tokens_recomputed) == (0, 0)
            assert cache_bytes(daemon, first, reused) == cache_bytes(daemon, second, reused)
        assert again.ids == await alone(daemons, "What?")

    async def test_computes_at_most_one_cell_of_a_document_on_disk(self, daemon, daemons: Daemons):
        async with peer_of(daemon.port) as peer:
            first, _ = await ask(peer, "Who?")
            await peer.settled(first)
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as peer:
            _, again = await ask(peer, "What?")
            assert again.accepted.prompt_tokens_new <= CELL
            assert again.restored.tier == types_pb2.TIER_COLD
            assert again.restored.bytes_read > 0
        assert again.ids == await alone(daemons, "What?")

    async def test_shares_what_a_running_turn_has_computed_so_far(self, daemon, peer: Peer):
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        stream = peer.open(session, f"{DOCUMENT}\nWho?", max_tokens=N)
        gate.let(5)
        await stream.read_tokens(1)  # its prompt is computed; the turn goes on
        gate.open()
        _, again = await ask(peer, "What?")
        assert again.accepted.prompt_tokens_new <= CELL
        await stream.read()

    async def test_of_another_system_prompt_shares_nothing(self, peer: Peer):
        await ask(peer, "Who?")
        _, again = await ask(peer, "Who?", system="Be Brief.")
        assert again.accepted.prompt_tokens_reused == 0
        assert "restored" not in again.kinds

    async def test_may_come_upon_the_document_in_a_later_turn(self, daemon, peer: Peer):
        """Hot already, it takes over cells behind those that it holds."""
        first = (await peer.create(system="Be brief.")).session_id
        second = (await peer.create(system="Be brief.")).session_id
        for session in (first, second):
            await peer.turn(session, "word " * 40, max_tokens=N, sampling=types_pb2.Sampling(temperature=0))
            await peer.settled(session)
        asked = await peer.turn(first, DOCUMENT, max_tokens=N)
        cache = daemon.desk.lives["default", second].cache
        assert cache.sealed < cache.length
        epoch = cache.epoch
        again = await peer.turn(second, DOCUMENT, max_tokens=N)
        assert cache.epoch != epoch, "whoever copies the provisional KV that cells overwrite must notice"
        assert again.ids == asked.ids
        assert again.accepted.prompt_tokens_new <= CELL < asked.accepted.prompt_tokens_new
        assert again.restored.tokens_restored >= CELL

    async def test_with_sealing_off_neither_gives_nor_takes(self, daemons: Daemons):
        daemon = await daemons.start(seal=False)
        async with peer_of(daemon.port) as peer:
            await ask(peer, "Who?")
            _, again = await ask(peer, "What?")
            assert again.accepted.prompt_tokens_reused == 0

    async def test_whose_sealing_is_off_takes_nothing_where_it_is_on(self, daemons: Daemons):
        daemon = await daemons.start(seal=False)
        async with peer_of(daemon.port) as peer:
            unsealed = (await peer.create(system="Be brief.")).session_id
        daemon = await daemons.restart(daemon, seal=True)
        async with peer_of(daemon.port) as peer:
            first, _ = await ask(peer, "Who?")
            await peer.settled(first)
            turn = await peer.turn(unsealed, f"{DOCUMENT}\nWhat?", max_tokens=N)
            assert turn.accepted.prompt_tokens_reused == 0

    async def test_takes_nothing_from_memory_that_changes_while_it_is_copied(self, daemons: Daemons, monkeypatch):
        daemon = await daemons.start(settle_seconds=600)
        from sessiond.cache import SessionCache

        copy = SessionCache.copy_from

        def disturbed(self: SessionCache, other: SessionCache, layer: int, span: Any) -> None:
            copy(self, other, layer, span)
            self._raw[layer, :, :, span.start : span.end] = 7  # what a truncation in between might have left
            other.epoch += 1

        async with peer_of(daemon.port) as peer:
            await ask(peer, "Who?")
            monkeypatch.setattr(SessionCache, "copy_from", disturbed)
            _, again = await ask(peer, "What?")
            assert again.accepted.prompt_tokens_reused == 0
        assert again.ids == await alone(daemons, "What?")


class TestDamage:
    async def test_in_a_shared_cell_is_computed_again_and_leaves_a_hot_session_as_it_was(self, daemon, peer: Peer):
        """A cell that fails while it is read into a hot session must not spoil what the session holds."""
        first = (await peer.create(system="Be brief.")).session_id
        second = (await peer.create(system="Be brief.")).session_id
        for session in (first, second):
            await peer.turn(session, "word " * 40, max_tokens=N)
            await peer.settled(session)
        asked = await peer.turn(first, DOCUMENT, max_tokens=N)
        await peer.settled(first)
        await peer.suspend(first)
        read = daemon.desk.store.blocks.read_into
        failed = []

        def failing(owner: Any, start: int, n_tokens: int, n_layers: int, out: Any) -> int:
            if not failed and start >= 2 * CELL:
                failed.append(start)
                for layer in range(n_layers):
                    out(layer, 0)[...] = 9  # half read
                from sessiond.errors import RecordCorrupt

                raise RecordCorrupt("damaged")
            return read(owner, start, n_tokens, n_layers, out)

        daemon.desk.store.blocks.read_into = failing
        again = await peer.turn(second, DOCUMENT, max_tokens=N)
        assert failed
        assert again.ids == asked.ids


class TestTenants:
    @pytest.fixture
    def settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "trust_tenant_metadata": True}

    async def test_never_share_neither_in_memory_nor_on_disk(self, daemon):
        async with peer_of(daemon.port, tenant="alice") as alice:
            hers, _ = await ask(alice, "Who?")
            await self.shares_nothing(daemon, "bob")
            await alice.settled(hers)
            await alice.suspend(hers)
            await self.shares_nothing(daemon, "carol")
            _, again = await ask(alice, "What?")
            assert again.accepted.prompt_tokens_reused > 0

    async def shares_nothing(self, daemon, tenant: str) -> None:
        async with peer_of(daemon.port, tenant=tenant) as peer:
            session, turn = await ask(peer, "Who?")
            assert turn.accepted.prompt_tokens_reused == 0
            assert "restored" not in turn.kinds
            await peer.delete(session, purge_now=True)


class TestAForkOfAHotSession:
    async def test_takes_its_whole_past_from_memory(self, daemons: Daemons):
        """Nothing is on disk but the log: cells and provisional tail are copied, none is computed."""
        daemon = await daemons.start(settle_seconds=600)
        async with peer_of(daemon.port) as peer:
            session, _ = await ask(peer, "Who?")
            await peer.turn(session, "And?", max_tokens=N)
            branch = (await fork(peer, session)).session_id
            length = (await peer.get(session)).token_count
            turn = await peer.turn(branch, "So?", max_tokens=N)
            assert turn.restored.tokens_recomputed == 0
            assert turn.accepted.prompt_tokens_reused == length - 1
            assert cache_bytes(daemon, session, length - 1) == cache_bytes(daemon, branch, length - 1)
            assert turn.ids == (await peer.turn(session, "So?", max_tokens=N)).ids

    @pytest.mark.parametrize("name", ["h2o", "snapkv", "sieve"])
    async def test_goes_on_with_what_its_policy_has_learned(self, daemons: Daemons, name: str):
        daemon = await daemons.start(settle_seconds=600)
        async with peer_of(daemon.port) as peer:
            policy = {"name": name, **SMALL[name]}
            session, _ = await ask(peer, "Who?")
            for question in ("And?", "Why?"):
                await peer.turn(session, question, max_tokens=N, policy=policy)
            branch = (await fork(peer, session)).session_id
            turns = [await peer.turn(one, "So?", max_tokens=N, policy=policy) for one in (branch, session)]
            assert turns[0].ids == turns[1].ids
            known = [daemon.desk.live("default", one).cache.selection.nbytes for one in (branch, session)]
            assert known[0] == known[1] > 0

    async def test_finds_its_tail_on_disk_though_the_other_branch_has_gone_on(self, daemon, daemons: Daemons):
        async with peer_of(daemon.port) as peer:
            session, _ = await ask(peer, "Who?")
            await peer.settled(session)
            length = (await peer.get(session)).token_count
            branch = (await fork(peer, session)).session_id
            await say(peer, session, "And?", "Well?")
            await peer.delete(session, purge_now=True)
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as peer:
            turn = await peer.turn(branch, "So?", max_tokens=N)
            assert (turn.restored.tokens_recomputed, turn.accepted.prompt_tokens_reused) == (0, length - 1)

    async def test_leaves_the_tails_of_its_past_to_whose_they_are(self, daemon, peer: Peer):
        session, _ = await ask(peer, "Who?")
        await say(peer, session, "And?")
        first, second = [revision.revision_id for revision in await peer.revisions(session)][1:]
        await rollback(peer, session, first)
        log = daemon.desk.store.log
        async with asyncio.timeout(PATIENCE):
            while log.tail_ref("default", first) is None:  # noqa: ASYNC110 - written behind
                await asyncio.sleep(0.02)
        branch = (await fork(peer, session, second)).session_id
        await say(peer, branch, "So?")
        assert log.tail_ref("default", first)


class TestErasing:
    async def test_the_last_branch_takes_along_what_purged_ones_had_left(self, daemon, peer: Peer):
        session, _ = await ask(peer, "Who?")
        branch = (await fork(peer, session)).session_id
        await say(peer, branch, "And?")
        twig = (await fork(peer, branch)).session_id
        await say(peer, twig, "So?")
        await peer.delete(session, purge_now=True)
        await peer.delete(branch, purge_now=True)
        assert len(await peer.revisions(twig)) == 4
        assert (await say(peer, twig, "Well?"))[-1]
        await peer.delete(twig, purge_now=True)
        assert daemon.desk.store.log.tenants() == []
        assert list(daemon.desk.store.blocks.owners()) == []

    async def test_a_fork_that_comes_while_its_source_is_erased_is_refused_or_whole(self, daemon, peer: Peer):
        """Whichever comes first in the log wins: never a session without its past."""
        from sessiond import erasure

        session, _ = await ask(peer, "Who?")
        needed, forks = erasure._needed, []
        loop = asyncio.get_running_loop()

        def interrupted(*args: Any) -> Any:
            found = needed(*args)
            if not forks:  # counted what is needed; now the fork comes
                forks.append(asyncio.run_coroutine_threadsafe(fork(peer, session), loop).result(PATIENCE))
            return found

        erasure._needed = interrupted
        try:
            await peer.delete(session, purge_now=True)
        finally:
            erasure._needed = needed
        branch = forks[0].session_id
        assert len(await peer.revisions(branch)) == 2
        assert (await peer.turn(branch, "So?", max_tokens=N)).ids
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await peer.get(session)


class TestRevisions:
    async def test_beside_the_heads_branch_are_exact_as_far_as_both_go_together(self, peer: Peer):
        session, _ = await ask(peer, "Who?")
        await say(peer, session, "word " * 60)
        _, first, second = [revision.revision_id for revision in await peer.revisions(session)]
        await rollback(peer, session, first)
        await say(peer, session, "else " * 60)
        found = {revision.revision_id: revision for revision in await peer.revisions(session)}
        assert found[second].parent_revision_id == first
        assert found[second].exact_upto == min(found[first].log_end, (await peer.get(session)).exact_upto)
        one = await peer.call(peer.sessions.GetRevision, pb.GetRevisionRequest(session_id=session, revision_id=second))
        assert one.exact_upto == found[second].exact_upto
        assert np.array_equal([one.log_start, one.log_end], [found[second].log_start, found[second].log_end])


class TestGoingBackAndForth:
    """Rolled back, sealed there, and returned: memory holds sealed cells, and less than the head's tail on disk."""

    @pytest.fixture
    async def returned(self, daemon, peer: Peer) -> str:
        patient = daemon.desk.settings.model_copy(update={"settle_seconds": 600})
        quick, daemon.desk.settings = daemon.desk.settings, patient
        session = (await peer.create(system="Be brief.")).session_id
        for _ in range(4):
            await peer.turn(session, "word " * 12, max_tokens=N)  # each less than a cell: nothing is canonical yet
        *_, before, head = [revision.revision_id for revision in await peer.revisions(session)]
        await peer.suspend(session)  # its tail begins at 0
        await rollback(peer, session, before)
        await peer.call(peer.sessions.WarmSession, pb.WarmSessionRequest(session_id=session))
        daemon.desk.settings = quick
        await rollback(peer, session, before)
        await peer.settled(session)
        daemon.desk.settings = patient
        await rollback(peer, session, head)
        live = daemon.desk.lives["default", session]
        assert CELL <= live.cache.sealed < live.cache.length < len(live.ids) - 1
        return session

    async def test_a_tail_that_reaches_below_sealed_cells_in_memory_leaves_them_as_they_are(
        self, daemon, peer: Peer, returned: str
    ):
        sealed = daemon.desk.lives["default", returned].cache.sealed
        before = cache_bytes(daemon, returned, sealed)
        turn = await peer.turn(returned, DOCUMENT, max_tokens=N)
        assert turn.restored.tokens_restored > 0
        assert cache_bytes(daemon, returned, sealed) == before

    async def test_a_tail_that_fails_while_it_is_read_leaves_what_memory_holds(
        self, daemon, peer: Peer, returned: str, monkeypatch
    ):
        held = daemon.desk.lives["default", returned].cache.length
        before = cache_bytes(daemon, returned, held)
        fill = daemon.desk.tiers.restorer.fill
        after = []

        def failing(owner: Any, start: int, n_tokens: int, n_layers: int, out: Any) -> int:
            for layer in range(n_layers):
                out(layer, 0)[...] = 9  # half read
            raise RecordCorrupt("damaged")

        def filled(*args: Any, **kwargs: Any) -> Any:
            report = fill(*args, **kwargs)
            after.extend(cache_bytes(daemon, returned, held))
            return report

        monkeypatch.setattr(daemon.desk.store.blocks, "read_into", failing)
        monkeypatch.setattr(daemon.desk.tiers.restorer, "fill", filled)
        await peer.turn(returned, DOCUMENT, max_tokens=N)
        assert after == before

    async def test_memory_that_holds_less_than_the_heads_tail_does_not_replace_it(
        self, daemon, peer: Peer, returned: str
    ):
        live, tails = daemon.desk.lives["default", returned], daemon.desk.store.log.tail_ref
        before = tails("default", live.head)
        await daemon.desk.persist(live)
        assert tails("default", live.head) == before
        await peer.suspend(returned)
        turn = await peer.turn(returned, DOCUMENT, max_tokens=N)
        assert turn.restored.tokens_recomputed == 0

    async def test_two_sessions_that_write_the_tail_of_their_common_head_at_once_write_two_generations(
        self, daemon, returned: str, monkeypatch
    ):
        live = daemon.desk.lives["default", returned]
        persist, start, n = daemon.desk.tiers.persist_tail, live.cache.sealed, live.cache.length
        together, encode, written = threading.Barrier(2), tiers.encode_kv, []

        def encoding(owner: Any, *args: Any, **kwargs: Any) -> Any:
            written.append(owner.generation)
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(0.5)
            return encode(owner, *args, **kwargs)

        batch = LogBatch()
        batch.delete_tail_ref("default", live.head)
        daemon.desk.store.log.write(batch).result()
        monkeypatch.setattr(tiers, "encode_kv", encoding)
        await asyncio.gather(
            *(
                asyncio.to_thread(persist, "default", live.head, start, live.cache.copies(start, n), [])
                for _ in range(2)
            )
        )
        assert sorted(written) == [1, 2]
