"""Sessions that move between daemons as archives, and what becomes of them there."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2e_archive import export, import_, put_together, take_apart, with_other_kv
from e2e_daemon import Daemons, Gate, Peer, peer_of, recorded, refused
from e2e_model import write_chat_model
from grpc import StatusCode
from test_e2e_branches import rollback
from test_e2e_care import verify
from typer.testing import CliRunner

from sessiond.cli_app import app
from sessiond.clients.errors import ResourceExhaustedError
from sessiond.collector import collect
from sessiond.errors import DiskFull, StoreReadOnly
from sessiond.server import Daemon
from sessiond.storage import keys
from sessiond.types import Span
from sessiond.v1 import sessions_pb2 as pb

CELL = 128
LONG = 64
TEXT = "word " * 60  # whole cells and a tail
DOCUMENT = "another " * 40  # more than a cell


def blocks_of(daemon: Daemon) -> int:
    assert daemon.desk is not None
    return daemon.desk.store.blocks.stat().entries


def prefilled(daemon: Daemon) -> int:
    assert daemon.desk is not None
    return daemon.desk.engine.counters.prefilled


async def talked(peer: Peer, *texts: str, system: str = "Be brief.") -> str:
    """A session of some turns, all of it sealed and on disk."""
    session = (await peer.create(system=system)).session_id
    for text in texts or (TEXT, "And?"):
        await peer.turn(session, text, max_tokens=20)
        await peer.settled(session)
    return session


@pytest.fixture
async def away(daemons: Daemons, tmp_path: Path) -> Daemon:
    """A second daemon of the same model, with a data directory of its own."""
    return await daemons.start(data_dir=tmp_path / "away")


@pytest.fixture
async def other(away: Daemon):
    async with peer_of(away.port) as peer:
        yield peer


class TestAnImportedSession:
    async def test_goes_on_exactly_as_at_home(self, peer: Peer, other: Peer, away: Daemon):
        session = await talked(peer)
        archive, header = await export(peer, session)
        done = await import_(other, archive, labels={"from": "afar"})
        assert done.verdict == pb.IMPORT_VERDICT_EXACT
        assert not done.differing_fields
        before = await peer.get(session)
        assert done.tokens == header.n_tokens == before.token_count
        assert done.tokens_with_kv == header.tokens_with_kv == before.token_count - 1
        assert header.estimated_bytes == pytest.approx(len(archive), rel=0.1)
        assert dict(done.session.labels) == {"from": "afar"}
        assert done.session.session_id != session
        assert done.session.head_revision_id != before.head_revision_id
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        computed = prefilled(away)
        there = await other.turn(done.session.session_id, "Go on", max_tokens=LONG)
        assert there.ids == here.ids
        assert there.restored.tokens_recomputed == 0
        assert there.accepted.prompt_tokens_reused == before.token_count - 1
        assert prefilled(away) - computed == there.accepted.prompt_tokens_new == here.accepted.prompt_tokens_new

    async def test_has_the_very_bytes_it_was_exported_with(self, peer: Peer, daemon: Daemon, other: Peer, away: Daemon):
        session = await talked(peer)
        archive, _ = await export(peer, session)
        done = await import_(other, archive)
        there = await other.call(other.sessions.WarmSession, pb.WarmSessionRequest(session_id=done.session.session_id))
        assert there.restored.tokens_restored == done.tokens_with_kv
        assert kv(away, done.session.session_id) == kv(daemon, session)

    async def test_has_the_same_revisions_under_ids_of_its_own(self, peer: Peer, other: Peer):
        session = await talked(peer, TEXT, "And?", "Then?")
        done = await import_(other, (await export(peer, session))[0])
        ours = await peer.revisions(session)
        theirs = await other.revisions(done.session.session_id)
        assert not {r.revision_id for r in ours} & {r.revision_id for r in theirs}
        assert [told(r) for r in theirs] == [told(r) for r in ours]
        assert [r.parent_revision_id for r in theirs[1:]] == [r.revision_id for r in theirs[:-1]]

    async def test_is_sealed_by_its_new_home_in_idle_time(self, peer: Peer, other: Peer, away: Daemon):
        session = await talked(peer)
        done = await import_(other, (await export(peer, session))[0])
        imported = done.session.session_id
        assert (await other.get(imported)).exact_upto == 0
        assert (await other.get(imported)).persisted_upto == done.tokens_with_kv
        await other.turn(imported, "Go on", max_tokens=4)
        now = await other.settled(imported)
        assert now.exact_upto == now.token_count // CELL * CELL
        tails = [
            ref
            for revision in await other.revisions(imported)
            if (ref := away.desk.store.log.tail_ref("default", revision.revision_id))
        ]
        assert [ref.start for ref in tails] == [now.exact_upto], "what came with the archive is gone"

    async def test_reads_a_long_input_behind_what_it_brought(self, peer: Peer, other: Peer, away: Daemon):
        """Sealing it first would compute everything again before the first token."""
        session = await talked(peer)
        done = await import_(other, (await export(peer, session))[0])
        here = await peer.turn(session, DOCUMENT, max_tokens=LONG)
        computed = prefilled(away)
        there = await other.turn(done.session.session_id, DOCUMENT, max_tokens=LONG)
        assert there.ids == here.ids
        assert prefilled(away) - computed == here.accepted.prompt_tokens_new < done.tokens

    async def test_survives_being_pushed_out_before_it_was_sealed(self, peer: Peer, daemons: Daemons, tmp_path: Path):
        """What is borrowed stays so on disk: the next long input still need not compute it again."""
        session = await talked(peer)
        archive, _ = await export(peer, session)
        await peer.turn(session, "Go on", max_tokens=4)
        here = await peer.turn(session, DOCUMENT, max_tokens=LONG)
        away = await daemons.start(data_dir=tmp_path / "away", settle_seconds=600)
        async with peer_of(away.port) as other:
            imported = (await import_(other, archive)).session.session_id
            await other.turn(imported, "Go on", max_tokens=4)
            await other.suspend(imported)
            assert (await other.get(imported)).exact_upto == 0
            computed = prefilled(away)
            there = await other.turn(imported, DOCUMENT, max_tokens=LONG)
            assert there.restored.tokens_recomputed == 0
            assert there.ids == here.ids
            open_cell = CELL
            assert prefilled(away) - computed <= there.accepted.prompt_tokens_new + open_cell < 3 * CELL + CELL

    async def test_of_cells_of_another_size_is_used_as_well(self, peer: Peer, daemons: Daemons, tmp_path: Path):
        session = await talked(peer)
        archive, _ = await export(peer, session)
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        away = await daemons.start(data_dir=tmp_path / "away", cell_tokens=256)
        async with peer_of(away.port) as other:
            done = await import_(other, archive)
            there = await other.turn(done.session.session_id, "Go on", max_tokens=LONG)
            assert done.verdict == pb.IMPORT_VERDICT_EXACT
            assert (there.ids, there.restored.tokens_recomputed) == (here.ids, 0)
            back, _ = await export(other, done.session.session_id)
        again = await import_(peer, back)
        assert again.tokens_with_kv >= done.tokens_with_kv

    async def test_of_tokens_only_is_computed_again(self, peer: Peer, other: Peer):
        session = await talked(peer)
        archive, header = await export(peer, session, tokens_only=True)
        done = await import_(other, archive)
        assert (header.tokens_with_kv, done.tokens_with_kv) == (0, 0)
        assert done.verdict == pb.IMPORT_VERDICT_EXACT
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        there = await other.turn(done.session.session_id, "Go on", max_tokens=LONG)
        assert there.ids == here.ids
        assert [reason.reason for reason in there.restored.reasons] == [pb.RECOMPUTE_CAUSE_NOT_PERSISTED]

    async def test_moves_on_before_anything_of_it_was_sealed(self, peer: Peer, other: Peer, daemons, tmp_path):
        session = await talked(peer)
        first = await import_(other, (await export(peer, session))[0])
        second_archive, header = await export(other, first.session.session_id)
        assert header.tokens_with_kv == first.tokens_with_kv
        third = await daemons.start(data_dir=tmp_path / "third")
        async with peer_of(third.port) as last:
            done = await import_(last, second_archive)
            there = await last.turn(done.session.session_id, DOCUMENT, max_tokens=LONG)
        here = await peer.turn(session, DOCUMENT, max_tokens=LONG)
        assert (there.ids, there.restored.tokens_recomputed) == (here.ids, 0)

    async def test_back_home_uses_the_cells_that_are_there(self, peer: Peer, daemon: Daemon):
        session = await talked(peer)
        before = blocks_of(daemon)
        done = await import_(peer, (await export(peer, session))[0])
        copy = done.session.session_id
        tail_records = blocks_of(daemon) - before
        assert (await peer.get(copy)).exact_upto == (await peer.get(session)).exact_upto
        assert tail_records <= 2 * 2, "only its tail was stored again"
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        there = await peer.turn(copy, "Go on", max_tokens=LONG)
        assert there.ids == here.ids

    async def test_is_whole_after_a_kill(self, peer: Peer, spawn, tmp_path: Path):
        session = await talked(peer)
        archive, _ = await export(peer, session)
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        process = spawn(data_dir=tmp_path / "away")
        async with peer_of(process.port) as other:
            imported = (await import_(other, archive)).session.session_id
            process.kill()
        process = spawn(data_dir=tmp_path / "away")
        async with peer_of(process.port) as other:
            there = await other.turn(imported, "Go on", max_tokens=LONG)
        assert (there.ids, there.restored.tokens_recomputed) == (here.ids, 0)

    async def test_appears_whole_or_not_at_all(self, peer: Peer, other: Peer, away: Daemon, daemons, tmp_path):
        """A death before the one transaction leaves KV that nobody refers to, and no session."""
        archive, _ = await export(peer, await talked(peer))
        store, write = away.desk.store, away.desk.store.log.write
        copies: list[Path] = []

        def dying(batch: Any) -> Any:
            for when in ("before", "after"):
                copies.append(Path(shutil.copytree(store.root, tmp_path / when)))
                if when == "before":
                    done = write(batch)
                    done.result()
            return done

        store.log.write = dying
        imported = (await import_(other, archive)).session.session_id
        del store.log.write
        for copy, sessions in zip(copies, (0, 1), strict=True):
            daemon = await daemons.start(data_dir=copy)
            log = daemon.desk.store.log
            assert [record.session_id for record in log.sessions()] == [imported] * sessions
            assert daemon.desk.store.blocks.stat().entries > 0
            assert len(log.ids("default", keys.TAIL_REF)) == len(log.ids("default", keys.REVISION)) // 3 == sessions
            await daemons.stop(daemon)

    async def test_leaves_nothing_when_it_is_purged(self, peer: Peer, other: Peer, away: Daemon):
        done = await import_(other, (await export(peer, await talked(peer)))[0])
        await other.delete(done.session.session_id, purge_now=True)
        assert away.desk.store.log.tenants() == []
        assert blocks_of(away) == 0


def kv(daemon: Daemon, session_id: str) -> list[bytes]:
    """All KV that a session has in memory."""
    cache = daemon.desk.lives["default", session_id].cache
    return [array.tobytes() for pair in cache.copies(0, cache.length) for array in pair]


def told(revision: Any) -> Any:
    """A revision without ids."""
    copy = type(revision)()
    copy.CopyFrom(revision)
    for name in ("revision_id", "session_id", "parent_revision_id", "create_time", "exact_upto"):
        copy.ClearField(name)
    return copy


async def new_names(peer: Peer, session: str, other: Peer, imported: str) -> dict[str, str]:
    """What each revision is called after the import."""
    pairs = zip(await peer.revisions(session), await other.revisions(imported), strict=True)
    return {ours.revision_id: theirs.revision_id for ours, theirs in pairs}


class TestABfloat16Model:
    """KV in exponent planes, through the compiled kernels where there are any."""

    @pytest.fixture
    def settings(self, settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
        return {**settings, "model": str(write_chat_model(tmp_path / "bf16", for_kernels=True))}

    async def test_goes_on_exactly_as_at_home(self, peer: Peer, daemon: Daemon, other: Peer, away: Daemon):
        session = await talked(peer)
        archive, header = await export(peer, session)
        imported = (await import_(other, archive)).session.session_id
        await other.call(other.sessions.WarmSession, pb.WarmSessionRequest(session_id=imported))
        assert kv(away, imported) == kv(daemon, session)
        here = await peer.turn(session, DOCUMENT, max_tokens=LONG)
        there = await other.turn(imported, DOCUMENT, max_tokens=LONG)
        assert there.ids == here.ids
        assert there.accepted.prompt_tokens_new == here.accepted.prompt_tokens_new
        assert header.tokens_with_kv > 2 * CELL


class TestATree:
    async def test_comes_whole_with_all_revisions(self, peer: Peer, other: Peer):
        session = await talked(peer, TEXT, "Left", "More")
        fork_point = (await peer.revisions(session))[1].revision_id
        await rollback(peer, session, fork_point)
        await peer.turn(session, DOCUMENT, max_tokens=20)
        right = (await peer.settled(session)).head_revision_id
        archive, header = await export(peer, session, all_revisions=True)
        assert header.n_revisions == 5
        done = await import_(other, archive)
        names = await new_names(peer, session, other, done.session.session_id)
        assert done.session.head_revision_id == names[right]
        there = await other.turn(done.session.session_id, "Go on", max_tokens=LONG)
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        assert (there.ids, there.restored.tokens_recomputed) == (here.ids, 0)

    async def test_has_the_kv_of_its_other_branches_too(self, peer: Peer, other: Peer):
        session = await talked(peer, TEXT, "Left", "More")
        fork_point = (await peer.revisions(session))[1].revision_id
        left = (await peer.get(session)).head_revision_id
        await rollback(peer, session, fork_point)
        await peer.turn(session, DOCUMENT, max_tokens=20)
        await peer.settled(session)
        archive, _ = await export(peer, session, all_revisions=True)
        imported = (await import_(other, archive)).session.session_id
        names = await new_names(peer, session, other, imported)
        await rollback(other, imported, names[left])
        await rollback(peer, session, left)
        there = await other.turn(imported, "Go on", max_tokens=LONG)
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        assert there.ids == here.ids
        assert there.restored.tokens_recomputed <= 1, "the last token of an answer was never fed"
        assert there.accepted.prompt_tokens_new <= here.accepted.prompt_tokens_new + 1

    async def test_moves_on_whole_before_anything_of_it_was_sealed(self, peer: Peer, other: Peer, daemons, tmp_path):
        """A fork lies across a cell, so its blocks are of odd lengths: stored, they are runs like any other."""
        session = await talked(peer, TEXT, "Left", "More")
        fork_point = (await peer.revisions(session))[1].revision_id
        await rollback(peer, session, fork_point)
        await peer.turn(session, DOCUMENT, max_tokens=20)
        await peer.settled(session)
        archive, _ = await export(peer, session, all_revisions=True)
        first = (await import_(other, archive)).session.session_id
        second, header = await export(other, first, all_revisions=True)
        one, two = take_apart(archive)[1], take_apart(second)[1]
        assert sum(block.n_tokens for block, _ in two) == sum(block.n_tokens for block, _ in one)
        assert header.tokens_with_kv == (await peer.get(session)).token_count - 1
        third = await daemons.start(data_dir=tmp_path / "third")
        async with peer_of(third.port) as last:
            there = await last.turn((await import_(last, second)).session.session_id, "Go on", max_tokens=LONG)
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        assert (there.ids, there.restored.tokens_recomputed) == (here.ids, 0)

    async def test_gives_up_only_the_branch_that_is_asked_for(self, peer: Peer, other: Peer):
        session = await talked(peer, TEXT, "Left", "More")
        middle = (await peer.revisions(session))[2]
        archive, header = await export(peer, session, revision_id=middle.revision_id)
        assert (header.n_revisions, header.n_tokens) == (3, middle.log_end)
        assert header.head_revision_id == middle.revision_id
        assert (await import_(other, archive)).session.token_count == middle.log_end

    async def test_of_another_session_is_not_found(self, peer: Peer):
        session, stranger = await talked(peer, "Hi"), await talked(peer, "Ho")
        head = (await peer.get(stranger)).head_revision_id
        with refused("REVISION_NOT_FOUND", StatusCode.NOT_FOUND):
            await export(peer, session, revision_id=head)
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await export(peer, "nobody")


def collecting(daemon: Daemon, patch: pytest.MonkeyPatch) -> list[int]:
    """Let the collector run before the next write to the log; how many things it erased comes into the list."""
    store, collected = daemon.desk.store, []
    write = store.log.write

    def collect_first(batch: Any) -> Any:
        patch.setattr(store.log, "write", write)
        with ThreadPoolExecutor(1) as beside:
            collected.append(beside.submit(collect, store, lambda: None).result())
        return write(batch)

    patch.setattr(store.log, "write", collect_first)
    return collected


class TestTheCareOfTheStore:
    async def test_finds_nothing_wrong_with_an_imported_tree(self, peer: Peer, other: Peer):
        session = await talked(peer, TEXT, "Left")
        await rollback(peer, session, (await peer.revisions(session))[1].revision_id)
        await peer.turn(session, DOCUMENT, max_tokens=20)
        await peer.settled(session)
        await import_(other, (await export(peer, session, all_revisions=True))[0])
        findings, summary = await verify(other)
        assert not findings
        assert summary.records > 0

    async def test_collects_nothing_of_an_import_that_is_under_way(
        self, peer: Peer, other: Peer, away: Daemon, monkeypatch
    ):
        """KV is durable before the session: in between it looks like garbage."""
        session = await talked(peer)
        archive, _ = await export(peer, session)
        with monkeypatch.context() as patch:
            collected = collecting(away, patch)
            imported = (await import_(other, archive)).session.session_id
        assert collected == [0]
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        there = await other.turn(imported, "Go on", max_tokens=LONG)
        assert (there.ids, there.restored.tokens_recomputed) == (here.ids, 0)

    async def test_would_collect_it_if_it_were_not_held(self, peer: Peer, other: Peer, away: Daemon, monkeypatch):
        """The defence switched off."""
        archive, _ = await export(peer, await talked(peer))
        with monkeypatch.context() as patch:
            patch.setattr(away.desk.store.inflight, "hold", lambda names: contextlib.nullcontext())
            collected = collecting(away, patch)
            imported = (await import_(other, archive)).session.session_id
        there = await other.turn(imported, "Go on", max_tokens=4)
        assert collected[0] > 0
        assert there.restored.tokens_recomputed > 0


class TestWhatAnArchiveClaimsOfItsKV:
    """KV is believed for the imported session only, and only until it was computed again."""

    @pytest.fixture
    async def poisoned(self, peer: Peer) -> bytes:
        """An archive whose hashes fit, of KV that is not that of its tokens."""
        manifest, blocks = take_apart((await export(peer, await talked(peer)))[0])
        return put_together(manifest, [with_other_kv(*block) for block in blocks])

    async def spread(self, other: Peer, poisoned: bytes) -> list[int]:
        """Import it, use it and let it settle; then the answer of another session that begins with the same tokens."""
        imported = (await import_(other, poisoned)).session.session_id
        await other.turn(imported, DOCUMENT, max_tokens=8)
        await other.settled(imported)
        await other.suspend(imported)
        session = (await other.create(system="Be brief.")).session_id
        turn = await other.turn(session, TEXT, max_tokens=LONG)
        return turn.ids

    async def honest(self, peer: Peer) -> list[int]:
        session = (await peer.create(system="Be brief.")).session_id
        return (await peer.turn(session, TEXT, max_tokens=LONG)).ids

    async def test_never_reaches_another_session(self, peer: Peer, other: Peer, poisoned: bytes):
        assert await self.spread(other, poisoned) == await self.honest(peer)

    async def test_is_gone_from_the_session_itself_once_that_is_sealed(self, peer: Peer, other: Peer, away, poisoned):
        imported = (await import_(other, poisoned)).session.session_id
        await other.turn(imported, "Go on", max_tokens=4)
        await other.settled(imported)
        cache = away.desk.lives["default", imported].cache
        seen = [pair[0].copy() for pair in cache.arrays(Span(0, CELL))]
        honest = (await other.create(system="Be brief.")).session_id
        await other.turn(honest, TEXT, max_tokens=4)
        await other.settled(honest)
        truth = away.desk.lives["default", honest].cache.arrays(Span(0, CELL))
        assert all((a == b[0]).all() for a, b in zip(seen, truth, strict=True))

    async def test_would_reach_another_session_if_it_were_taken_for_sealed(
        self, peer: Peer, other: Peer, away: Daemon, poisoned: bytes, monkeypatch
    ):
        """The defence switched off: this is what it is for."""
        fill = away.desk.tiers.restorer.fill

        def trusting(tenant, chain, ids, cache, **options):
            report = fill(tenant, chain, ids, cache, **options)
            cache.sealed = max(cache.sealed, cache.borrowed)
            return report

        monkeypatch.setattr(away.desk.tiers.restorer, "fill", trusting)
        assert await self.spread(other, poisoned) != await self.honest(peer)


class TestExport:
    async def test_runs_beside_a_turn_and_holds_what_is_committed(self, peer: Peer, daemon: Daemon, other: Peer):
        session = await talked(peer)
        before = await peer.get(session)
        gate = Gate(daemon)
        stream = peer.open(session, "Go on", max_tokens=LONG)
        gate.let(5)
        await stream.read_tokens(3)
        archive, header = await export(peer, session)
        gate.open()
        here = await stream.read()
        assert header.n_tokens == before.token_count
        assert header.tokens_with_kv == before.token_count - 1
        done = await import_(other, archive)
        assert (await other.turn(done.session.session_id, "Go on", max_tokens=LONG)).ids == here.ids

    async def test_writes_first_what_is_only_in_memory(self, daemons: Daemons, other: Peer):
        daemon = await daemons.start(settle_seconds=600)
        async with peer_of(daemon.port) as peer:
            session = (await peer.create(system="Be brief.")).session_id
            await peer.turn(session, TEXT, max_tokens=4)
            archive, header = await export(peer, session)
            now = await peer.get(session)
            assert header.tokens_with_kv == now.token_count - 1 == now.persisted_upto
            assert now.bytes_hot > 0, "the cache stayed"
            here = await peer.turn(session, "Go on", max_tokens=LONG)
        done = await import_(other, archive)
        assert (await other.turn(done.session.session_id, "Go on", max_tokens=LONG)).ids == here.ids

    @pytest.mark.parametrize("error", [DiskFull("no space"), StoreReadOnly("an fsync failed")], ids=lambda e: e.reason)
    async def test_goes_on_while_nothing_can_be_written(self, daemons: Daemons, other: Peer, monkeypatch, error):
        daemon = await daemons.start(settle_seconds=600)
        async with peer_of(daemon.port) as peer:
            session = (await peer.create(system="Be brief.")).session_id
            await peer.turn(session, TEXT, max_tokens=4)

            def refuse(*args, **kwargs):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(daemon.desk.store.log, "write", refuse)
                patch.setattr(daemon.desk.store.blocks, "write", refuse)
                archive, header = await export(peer, session)
            assert header.tokens_with_kv == 0, "and it says so"
            here = await peer.turn(session, "Go on", max_tokens=LONG)
        done = await import_(other, archive)
        assert (await other.turn(done.session.session_id, "Go on", max_tokens=LONG)).ids == here.ids

    async def test_leaves_damaged_kv_out(self, peer: Peer, daemon: Daemon, other: Peer):
        session = await talked(peer)
        await peer.suspend(session)
        second = next(ref for ref in daemon.desk.store.log.all_cell_refs("default") if ref.index == 1)

        def flip(txn) -> None:
            prefix = keys.kv_owner_prefix("default", keys.KV_CELL, second.prefix_hash, 0)
            with txn.cursor() as cursor:
                cursor.set_range(prefix)
                key, value = bytes(cursor.key()), bytearray(cursor.value())
            value[-5] ^= 1
            txn.put(key, bytes(value))

        daemon.desk.store.blocks._env.submit([flip], 10).result()
        archive, header = await export(peer, session)
        done = await import_(other, archive)
        assert done.tokens_with_kv == CELL < header.tokens_with_kv
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        there = await other.turn(done.session.session_id, "Go on", max_tokens=LONG)
        assert there.ids == here.ids
        assert there.restored.tokens_recomputed == header.tokens_with_kv - CELL

    @pytest.mark.parametrize(
        "kind", [keys.TOKENS, keys.MESSAGES, keys.REVISION], ids=["tokens", "messages", "revision"]
    )
    async def test_of_a_damaged_log_names_what_can_be_read(self, peer: Peer, daemon: Daemon, other: Peer, kind: int):
        session = await talked(peer, TEXT, "And?", "Then?")
        revisions = await peer.revisions(session)
        lost, good = revisions[2].revision_id, revisions[1]
        key = keys.tokens_key("default", lost, 0) if kind == keys.TOKENS else keys.record_key("default", kind, lost)

        def flip(txn) -> None:
            value = bytearray(txn.get(key))
            value[50] ^= 1
            txn.put(key, bytes(value))

        daemon.desk.store.log._env.submit([flip], 10).result()
        with refused("RECORD_CORRUPT", StatusCode.DATA_LOSS) as caught:
            await export(peer, session)
        assert caught.value.metadata["readable_revision_id"] == good.revision_id
        assert caught.value.metadata["readable_tokens"] == str(good.log_end)
        archive, _ = await export(peer, session, revision_id=good.revision_id)
        assert (await import_(other, archive)).tokens == good.log_end

    async def test_of_a_deleted_session_is_possible_until_it_is_purged(self, peer: Peer, other: Peer):
        session = await talked(peer, "Hi")
        await peer.delete(session)
        archive, _ = await export(peer, session)
        assert (await import_(other, archive)).verdict == pb.IMPORT_VERDICT_EXACT

    async def test_that_is_given_up_leaves_its_place_to_others(self, peer: Peer, daemon: Daemon):
        session = await talked(peer)
        for _ in range(10):
            call = peer.sessions.ExportSession(pb.ExportSessionRequest(session_id=session))
            await call.read()
            call.cancel()
        async with asyncio.timeout(10):
            while True:
                try:
                    await export(peer, session)
                    break
                except ResourceExhaustedError:  # gRPC tells the server in its own time
                    await asyncio.sleep(0.02)

    async def test_of_a_session_without_tokens(self, peer: Peer, other: Peer):
        empty = (await peer.create()).session_id
        done = await import_(other, (await export(peer, empty))[0])
        assert (done.tokens, done.session.token_count) == (0, 0)
        assert (await other.turn(done.session.session_id, "Hi", max_tokens=8)).ids == (
            await peer.turn(empty, "Hi", max_tokens=8)
        ).ids


class TestTenants:
    @pytest.fixture
    def settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "trust_tenant_metadata": True}

    async def test_export_only_what_is_theirs(self, daemon: Daemon):
        async with peer_of(daemon.port, tenant="a") as a, peer_of(daemon.port, tenant="b") as b:
            session = await talked(a, "Hi")
            with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
                await export(b, session)

    async def test_import_into_their_own(self, daemon: Daemon):
        async with peer_of(daemon.port, tenant="a") as a, peer_of(daemon.port, tenant="b") as b:
            session = await talked(a)
            done = await import_(b, (await export(a, session))[0])
            assert done.session.tenant == "b"
            with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
                await a.get(done.session.session_id)
            here = await a.turn(session, "Go on", max_tokens=LONG)
            there = await b.turn(done.session.session_id, "Go on", max_tokens=LONG)
            assert (there.ids, there.restored.tokens_recomputed) == (here.ids, 0)


class TestARequestId:
    async def test_makes_one_session_however_often_it_comes(self, peer: Peer, other: Peer):
        archive, _ = await export(peer, await talked(peer))
        first = await import_(other, archive, request_id="import-1")
        again = await import_(other, archive, request_id="import-1")
        assert recorded(again.session) == recorded(first.session)
        again.ClearField("session")
        first.ClearField("session")
        assert again == first
        assert len((await other.list()).sessions) == 1

    async def test_at_the_same_time_makes_one_too(self, peer: Peer, other: Peer, away: Daemon):
        archive, _ = await export(peer, await talked(peer))
        done = await asyncio.gather(*(import_(other, archive, request_id="import-1") for _ in range(2)))
        assert len({d.session.session_id for d in done}) == 1
        tails = [owner for owner in away.desk.store.blocks.owners() if owner.kind == "tail"]
        assert len(tails) == 1, "what the others had written is gone again"

    async def test_of_another_archive_is_refused(self, peer: Peer, other: Peer):
        one, _ = await export(peer, await talked(peer, "Hi"))
        two, _ = await export(peer, await talked(peer, "Ho"))
        await import_(other, one, request_id="import-1")
        with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
            await import_(other, two, request_id="import-1")
        with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
            await import_(other, one, request_id="import-1", labels={"a": "b"})
        await other.create(request_id="create-1")
        with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
            await import_(other, one, request_id="create-1")


class TestTheCommandLine:
    async def run(self, daemon: Daemon, *arguments: str) -> Any:
        address = ("--address", f"127.0.0.1:{daemon.port}")
        result = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, *address])
        assert result.exit_code == 0, result.output
        return result

    async def test_moves_a_session_as_a_file(self, peer: Peer, daemon, other: Peer, away, tmp_path: Path):
        session, file = await talked(peer), str(tmp_path / "session.snsd")
        await self.run(daemon, "sessions", "export", session, "--output", file)
        told = await self.run(away, "sessions", "import", file, "--label", "from=file")
        imported = told.stdout.split()[-1]
        assert dict((await other.get(imported)).labels) == {"from": "file"}
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        there = await other.turn(imported, "Go on", max_tokens=LONG)
        assert (there.ids, there.restored.tokens_recomputed) == (here.ids, 0)
