"""VerifyStore, CompactStore, the scrub and the collector, through the daemon and beside its turns."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

import grpc
import pytest
from e2e_daemon import PATIENCE, Daemons, Gate, Peer, Process, peer_of, refused
from grpc import StatusCode
from test_e2e_damage import damage, reference
from typer.testing import CliRunner

from sessiond.cache import SessionCache
from sessiond.cli_app import app
from sessiond.clients.errors import SessiondClientError, from_rpc_error
from sessiond.collector import collect
from sessiond.errors import StoreReadOnly
from sessiond.restoring import into
from sessiond.server import Daemon
from sessiond.storage import keys
from sessiond.storage.batch import LogBatch
from sessiond.storage.kv import KVOwner, encode_kv
from sessiond.storage.records import CellRef
from sessiond.types import Span
from sessiond.v1 import admin_pb2
from sessiond.v1 import sessions_pb2 as pb

TEXT = "word " * 60  # whole cells and a tail
LESS = TEXT[:140]


async def verify(peer: Peer, **fields) -> tuple[list[admin_pb2.Finding], admin_pb2.VerifySummary]:
    """Run a verification to its end; raises its typed error."""
    events = []
    try:
        async with asyncio.timeout(PATIENCE):
            call = peer.admin.VerifyStore(admin_pb2.VerifyStoreRequest(**fields), metadata=peer.metadata)
            events = [event async for event in call]
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[-1] == "summary"
    assert kinds.count("summary") == 1
    assert "progress" in kinds
    return [event.finding for event in events if event.WhichOneof("event") == "finding"], events[-1].summary


async def compact(peer: Peer, **fields) -> admin_pb2.CompactStoreResponse:
    return await peer.call(peer.admin.CompactStore, admin_pb2.CompactStoreRequest(**fields))


async def stats(peer: Peer) -> admin_pb2.GetStatsResponse:
    return await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())


async def reaches(peer: Peer, gauge: str, least: float) -> None:
    async with asyncio.timeout(PATIENCE):
        while (await stats(peer)).gauges[gauge] < least:  # noqa: ASYNC110 - the daemon's doing
            await asyncio.sleep(0.05)


async def happens(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the daemon's doing
            await asyncio.sleep(0.02)


async def cold_session(peer: Peer, text: str = TEXT) -> str:
    session = (await peer.create(system="Be brief.")).session_id
    await peer.turn(session, text, max_tokens=4)
    await peer.settled(session)
    await peer.suspend(session)
    return session


def damage_cell(daemon: Daemon, index: int = 0) -> bytes:
    """Flip a bit of a stored cell's last record; returns its key."""
    (ref,) = [ref for ref in daemon.desk.store.log.all_cell_refs("default") if ref.index == index]
    prefix = KVOwner("default", "cell", ref.prefix_hash).prefix
    env = daemon.desk.store.blocks.environment
    with env.read() as txn:
        key, value = [(bytes(k), bytearray(v)) for k, v in txn.cursor() if bytes(k).startswith(prefix)][-1]
    value[-1] ^= 1
    env.submit([lambda txn: txn.put(key, bytes(value))], 1).result()
    return key


def change_cell(daemon: Daemon, index: int = 0, profile: str | None = None) -> None:
    """Store other bytes of a cell, in good order: only computing them again can tell."""
    store, tiers = daemon.desk.store, daemon.desk.tiers
    (ref,) = [ref for ref in store.log.all_cell_refs("default") if ref.index == index]
    owner = KVOwner("default", "cell", ref.prefix_hash)
    cache = SessionCache(tiers.shape, tiers.capacity)
    span = Span(ref.start, ref.start + ref.n_tokens)
    store.blocks.read_into(owner, ref.start, ref.n_tokens, tiers.shape.n_layers, into(cache, span))
    cache.array(1, 1, span)[0, 5, 3] ^= 1
    coded = encode_kv(owner, ref.start, cache.arrays(span), codec=tiers._codec)
    store.blocks.write(coded.records).result()
    batch = LogBatch()
    fields = {name: getattr(ref, name) for name in CellRef.__slots__}
    batch.put_cell_ref(CellRef(**{**fields, "kv_digest": coded.kv_digest, "profile_id": profile or ref.profile_id}))
    store.log.write(batch).result()


class TestVerify:
    async def test_a_store_in_use_is_sound(self, peer: Peer, daemon):
        sessions = [await cold_session(peer, str(i) + TEXT) for i in range(2)]
        await peer.turn(sessions[0], "And?", max_tokens=4)
        findings, summary = await verify(peer, recompute=1.0, seed=1)
        assert [(f.kind, f.key) for f in findings] == []
        store = daemon.desk.store
        assert summary.records >= store.log.stat().entries + store.blocks.stat().entries
        assert summary.cells_recomputed == len(store.log.all_cell_refs("default")) > 3
        assert summary.milliseconds > 0
        assert not summary.findings

    @pytest.mark.parametrize("kind", ["cell", "tail"])
    async def test_a_damaged_reference_is_repaired_and_the_kv_computed_again(self, peer: Peer, daemon, kind: str):
        session = await cold_session(peer)
        damage(daemon, reference(daemon, kind, (await peer.get(session)).head_revision_id))
        findings, summary = await verify(peer)
        assert [(f.severity, f.kind, f.tenant) for f in findings] == [
            (admin_pb2.SEVERITY_REPAIRABLE, "checksum", "default")
        ]
        assert dict(summary.findings) == {"repairable": 1}
        findings, summary = await verify(peer, repair=True)
        assert [f.repaired for f in findings if f.kind == "checksum"] == [True]
        assert (await verify(peer))[0] == []
        turn = await peer.turn(session, "And?", max_tokens=2)
        assert turn.restored.tokens_recomputed > 0
        await peer.settled(session)
        assert (await verify(peer, recompute=1.0))[0] == []

    async def test_damaged_kv_is_named_repaired_and_clean(self, peer: Peer, daemon):
        session = await cold_session(peer)
        key = damage_cell(daemon)
        (finding,), _ = await verify(peer, session_ids=[session])
        assert (finding.kind, finding.key) == ("checksum", keys.readable(key))
        assert (finding.tokens.start, finding.tokens.end) == (0, 128)
        assert [f.repaired for f in (await verify(peer, repair=True))[0]] == [True]
        assert (await verify(peer))[0] == []

    async def test_a_damaged_token_log_is_a_loss_and_names_what_is_left(self, peer: Peer, daemon):
        session = await cold_session(peer)
        head = (await peer.get(session)).head_revision_id
        damage(daemon, keys.tokens_key("default", head, 0))
        before = (await stats(peer)).disk.kv_coded_bytes
        (finding,), summary = await verify(peer, repair=True)
        assert (finding.severity, finding.session_id) == (admin_pb2.SEVERITY_LOSS, session)
        assert "can be read" in finding.message
        assert summary.repaired == 0
        assert (await stats(peer)).disk.kv_coded_bytes == before

    async def test_a_wrong_cell_with_a_good_checksum_is_found_by_computing_it_again(self, peer: Peer, daemon):
        session = await cold_session(peer)
        change_cell(daemon, 1)
        assert (await verify(peer))[0] == []
        findings, summary = await verify(peer, recompute=1.0)
        assert [(f.kind, f.severity, f.session_id) for f in findings] == [
            ("recompute_differs", admin_pb2.SEVERITY_REPAIRABLE, session)
        ]
        assert "V of layer 1" in findings[0].message
        assert (findings[0].tokens.start, findings[0].tokens.end) == (128, 256)
        findings, _ = await verify(peer, recompute=1.0, repair=True)
        assert [f.repaired for f in findings] == [True]
        assert (await verify(peer, recompute=1.0))[0] == []
        assert summary.cells_recomputed > 1

    async def test_cells_of_another_profile_are_counted_and_no_damage(self, peer: Peer, daemon):
        await cold_session(peer)
        change_cell(daemon, 1, profile="another")
        findings, summary = await verify(peer, recompute=1.0)
        assert findings == []
        assert summary.cells_other_profile == 1

    async def test_cells_of_other_kernels_serve_and_are_not_compared(self, daemons: Daemons, peer: Peer, monkeypatch):
        """What an older version's kernels computed may differ in bits from what this one's would: that is no damage."""
        session = await cold_session(peer)
        (daemon,) = daemons.running
        change_cell(daemon, 1)
        n_cells = len(daemon.desk.store.log.all_cell_refs("default"))
        monkeypatch.setattr("sessiond.model.SOURCES", "of another version")
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as now:
            findings, summary = await verify(now, recompute=1.0)
            assert findings == []
            assert (summary.cells_recomputed, summary.cells_other_profile) == (0, n_cells)
            assert (await now.turn(session, "And?", max_tokens=2)).restored.tokens_recomputed == 0

    async def test_a_share_of_the_cells_is_drawn_by_the_seed(self, peer: Peer, daemon):
        for i in range(4):
            await cold_session(peer, str(i) + TEXT)
        n_cells = len(daemon.desk.store.log.all_cell_refs("default"))
        counts = [(await verify(peer, recompute=0.5, seed=seed))[1].cells_recomputed for seed in (7, 7, 8, 9)]
        assert counts[0] == counts[1]
        assert 0 < sum(counts) < 4 * n_cells

    async def test_an_audit_makes_room_within_the_budget(self, peer: Peer, daemon):
        session = await cold_session(peer)
        await peer.turn(session, "And?", max_tokens=4)
        most = 0
        seal_cells = daemon.desk.seal_cells

        async def watched(*args):
            nonlocal most
            most = max(most, daemon.desk.hot_bytes)
            await seal_cells(*args)

        daemon.desk.seal_cells = watched
        await verify(peer, recompute=1.0)
        held = daemon.desk.tiers.shape.bytes_per_token * (await peer.get(session)).token_count // 128 * 128
        assert most >= held
        assert daemon.desk.aside_bytes == 0

    async def test_an_audit_waits_until_turns_leave_it_memory(self, peer: Peer, daemon):
        await cold_session(peer)
        desk = daemon.desk
        desk.aside_bytes = desk.settings.memory_budget_bytes  # as if turns had all of it
        verifying = asyncio.create_task(verify(peer, recompute=1.0))
        await asyncio.sleep(0.5)
        assert not verifying.done()
        desk.aside_bytes = 0
        findings, summary = await verifying
        assert (findings, summary.cells_recomputed) == ([], 2)
        assert desk.aside_bytes == 0

    async def test_what_makes_no_sense_is_refused(self, peer: Peer):
        with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
            await verify(peer, recompute=1.5)
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await verify(peer, session_ids=["nobody"])

    async def test_a_client_that_leaves_ends_it(self, peer: Peer, daemon):
        await cold_session(peer)
        call = peer.admin.VerifyStore(admin_pb2.VerifyStoreRequest(repair=True))
        await call.read()
        call.cancel()
        assert (await verify(peer, repair=True))[0] == []  # it waits until the first has let go


class TestBesideTurns:
    async def test_verify_repair_compact_and_collect_while_turns_run(self, peer: Peer, daemon):
        """Nothing that turns write is taken for garbage, lost, or different from what it would have been."""
        quiet = (await peer.create(system="Be brief.")).session_id
        expected = [(await peer.turn(quiet, f"{LESS}{i}", max_tokens=12)).ids for i in range(3)]
        await peer.delete(quiet, purge_now=True)
        over = asyncio.Event()
        seen = []

        async def care() -> None:
            while not over.is_set():
                seen.extend((await verify(peer, repair=True))[0])
                await compact(peer)

        caring = asyncio.create_task(care())
        session = (await peer.create(system="Be brief.")).session_id
        for i in range(3):
            assert (await peer.turn(session, f"{LESS}{i}", max_tokens=12)).ids == expected[i]
            await peer.settled(session)
            await peer.suspend(session)
            await peer.warm(session)
        over.set()
        await caring
        assert [(f.kind, f.key, f.message) for f in seen] == []
        await peer.suspend(session)
        turn = await peer.turn(session, "And?", max_tokens=2)
        assert turn.restored.tokens_recomputed == 0

    async def test_a_turn_streams_on_while_the_files_are_replaced(self, peer: Peer, daemon):
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=30)
        gate.let(5)
        await stream.read_tokens(3)
        await compact(peer)
        gate.open()
        turn = await stream.read()
        assert len(turn.ids) == 30
        assert turn.error is None


class TestKVThatIsBeingWritten:
    """The collector runs at the worst moment: KV is durable in blocks, its reference is not yet in the log."""

    async def persisted_beside_the_collector(self, peer: Peer, daemon: Daemon, monkeypatch) -> list[admin_pb2.Finding]:
        blocks, runs = daemon.desk.store.blocks, []
        write = blocks.write

        def and_collect(records):
            done = write(records)
            done.result()
            runs.append(collect(daemon.desk.store, lambda: None))
            return done

        with monkeypatch.context() as patch:
            patch.setattr(blocks, "write", and_collect)
            session = (await peer.create(system="Be brief.")).session_id
            await peer.turn(session, TEXT, max_tokens=4)
            await peer.settled(session)
        assert len(runs) >= 3
        return (await verify(peer))[0]

    async def test_is_not_collected(self, peer: Peer, daemon, monkeypatch):
        assert await self.persisted_beside_the_collector(peer, daemon, monkeypatch) == []

    async def test_would_be_without_its_hold(self, peer: Peer, daemon, monkeypatch):
        monkeypatch.setattr(daemon.desk.store.inflight, "hold", lambda names: contextlib.nullcontext())
        findings = await self.persisted_beside_the_collector(peer, daemon, monkeypatch)
        assert {finding.kind for finding in findings} == {"missing"}


class TestBranches:
    async def test_forks_and_rollbacks_are_sound_and_nothing_of_them_is_collected(self, peer: Peer, daemon):
        source = await cold_session(peer)
        point = (await peer.get(source)).head_revision_id
        forks = [
            (await peer.call(peer.sessions.ForkSession, pb.ForkSessionRequest(session_id=source))).session_id
            for _ in range(2)
        ]
        await peer.turn(forks[0], "And?", max_tokens=3)
        await peer.turn(source, "So?", max_tokens=3)
        await peer.call(peer.sessions.RollbackSession, pb.RollbackSessionRequest(session_id=source, revision_id=point))
        await peer.turn(source, "Or?", max_tokens=3)
        for session in (source, *forks):
            await peer.suspend(session)
        assert [(f.kind, f.key) for f in (await verify(peer, recompute=1.0))[0]] == []
        await peer.delete(source, purge_now=True)
        assert [(f.kind, f.key) for f in (await verify(peer, repair=True))[0]] == []
        before = daemon.desk.store.log.stat().entries
        await compact(peer)
        assert daemon.desk.store.log.stat().entries == before
        for fork in forks:
            assert (await peer.turn(fork, "Well?", max_tokens=2)).restored.tokens_recomputed == 0
            await peer.settled(fork)
            await peer.delete(fork, purge_now=True)
        assert [(f.kind, f.key) for f in (await verify(peer))[0]] == []
        assert daemon.desk.store.blocks.stat().entries == 0


class TestCompact:
    async def test_it_gives_space_back(self, peer: Peer, daemon):
        keep = await cold_session(peer)
        for i in range(4):
            await peer.delete(await cold_session(peer, str(i) + TEXT * 2), purge_now=True)
        done = await compact(peer)
        assert done.after.blocks_file_bytes < done.before.blocks_file_bytes
        assert done.after.log_file_bytes < done.before.log_file_bytes
        assert done.after.kv_coded_bytes == done.before.kv_coded_bytes > 0
        assert (await peer.turn(keep, "And?", max_tokens=2)).restored.tokens_recomputed == 0
        assert (await verify(peer))[0] == []

    async def test_it_erases_deleted_sessions_only_when_asked(self, peer: Peer, daemon):
        session, other = await cold_session(peer), await cold_session(peer, "x" + TEXT)
        await peer.delete(session)
        assert (await compact(peer)).sessions_purged == 0
        await peer.undelete(session)
        await peer.delete(session)
        done = await compact(peer, purge_deleted=True)
        assert done.sessions_purged == 1
        assert done.records_erased > 5
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await peer.get(session)
        assert (await peer.turn(other, "And?", max_tokens=2)).restored.tokens_recomputed == 0

    async def test_it_erases_what_nobody_leads_to(self, peer: Peer, daemon):
        await cold_session(peer)
        store = daemon.desk.store
        batch = LogBatch()
        (ref, *_) = store.log.all_cell_refs("default")
        batch.delete_cell_ref("default", ref.prefix_hash)
        store.log.write(batch).result()
        records = store.blocks.stat().entries
        findings, _ = await verify(peer)
        assert [(f.severity, f.kind) for f in findings] == [(admin_pb2.SEVERITY_NOTICE, "unreferenced")]
        assert (await compact(peer)).records_erased == records - store.blocks.stat().entries > 0
        assert (await verify(peer))[0] == []
        assert (await stats(peer)).gauges["collected"] == 1

    async def test_without_room_for_the_copy_it_is_refused(self, peer: Peer, daemon, monkeypatch):
        session = await cold_session(peer)
        with monkeypatch.context() as patch:
            patch.setattr("sessiond.storage.space.free_bytes", lambda folder: 0)
            with refused("DISK_FULL", StatusCode.RESOURCE_EXHAUSTED) as caught:
                await compact(peer)
        assert caught.value.retry_after
        assert (await peer.turn(session, "And?", max_tokens=2)).restored.tokens_recomputed == 0

    @pytest.mark.parametrize("delay", [0.02, 0.1])
    async def test_a_killed_daemon_finds_its_store_whole(self, spawn, delay: float):
        """SIGKILL while it compacts over and over."""

        async def compact_on(peer: Peer) -> None:
            while True:
                await compact(peer)

        process: Process = spawn()
        async with peer_of(process.port) as peer:
            session = await cold_session(peer)
            compacting = asyncio.create_task(compact_on(peer))
            await asyncio.sleep(delay)
            process.kill()
            with pytest.raises(SessiondClientError):
                await compacting
        process = spawn()
        async with peer_of(process.port) as peer:
            assert (await verify(peer))[0] == []
            assert (await peer.turn(session, "And?", max_tokens=2)).restored.tokens_recomputed == 0


class TestTheScrub:
    async def test_finds_damaged_kv_and_drops_it(self, daemons: Daemons):
        daemon = await daemons.start(scrub_bytes_per_second=1e9)
        async with peer_of(daemon.port) as peer:
            session = await cold_session(peer)
            damage_cell(daemon)
            await reaches(peer, "scrub_repaired", 1)
            assert (await verify(peer))[0] == []
            turn = await peer.turn(session, "And?", max_tokens=2)
            assert turn.restored.tokens_recomputed > 0

    async def test_tells_a_loss_once(self, daemons: Daemons):
        daemon = await daemons.start(scrub_bytes_per_second=1e9)
        async with peer_of(daemon.port) as peer:
            session = await cold_session(peer)
            damage(daemon, keys.tokens_key("default", (await peer.get(session)).head_revision_id, 0))
            rounds = (await stats(peer)).gauges["scrub_rounds"]
            await reaches(peer, "scrub_rounds", rounds + 3)
            assert (await stats(peer)).gauges["scrub_losses"] == 1

    async def test_is_off_at_rate_0(self, peer: Peer, daemon):
        await cold_session(peer)
        assert daemon.settings.scrub_bytes_per_second == 0
        assert daemon.desk.scrub.n_bytes == 0


async def test_the_collector_runs_by_itself(daemons: Daemons):
    daemon = await daemons.start(collect_seconds=0.05)
    async with peer_of(daemon.port) as peer:
        await cold_session(peer)
        batch = LogBatch()
        for ref in daemon.desk.store.log.all_cell_refs("default"):
            batch.delete_cell_ref("default", ref.prefix_hash)
        daemon.desk.store.log.write(batch).result()
        await happens(lambda: daemon.care.collected >= 2)


class TestAFullDisk:
    async def test_refuses_new_turns_and_sessions_and_nothing_else(self, peer: Peer, daemon, monkeypatch):
        session = (await peer.create(system="Be brief.", request_id="made")).session_id
        done = await peer.turn(session, "Tell me", max_tokens=4, request_id="turn-1")
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=9, request_id="turn-2")
        gate.let(3)
        await stream.read_tokens(2)
        store = daemon.desk.store
        with monkeypatch.context() as patch:
            patch.setattr(store, "free_bytes", lambda: store.reserve_bytes - 1)
            before = store.log.stat().entries
            other = (await peer.create(system="Be brief.", request_id="made")).session_id
            assert other == session  # what was made before is told again
            with refused("DISK_FULL", StatusCode.RESOURCE_EXHAUSTED) as caught:
                await peer.create(system="Be brief.", request_id="new")
            assert caught.value.retry_after
            again = await peer.turn(session, "Tell me", max_tokens=4, request_id="turn-1")
            assert again.ids == done.ids
            joined = peer.open(session, "Tell me", max_tokens=9, request_id="turn-2")
            gate.open()
            assert len((await joined.read()).ids) == 9
            assert len((await stream.read()).ids) == 9
            with refused("DISK_FULL", StatusCode.RESOURCE_EXHAUSTED) as caught:
                await peer.turn(session, "More", max_tokens=4, request_id="turn-3")
            assert caught.value.retry_after
            assert store.log.request("default", session, "turn-3") is None
            assert (await stats(peer)).gauges["disk_reserve_used"] == 1
            assert store.log.stat().entries >= before
            assert (await peer.get(session)).session_id == session
        await peer.turn(session, "More", max_tokens=4, request_id="turn-3")

    async def test_keeps_kv_in_memory_until_there_is_space(self, daemons: Daemons, monkeypatch):
        daemon = await daemons.start(sweep_seconds=0.05)
        full = True

        def is_low(self, reserve_bytes):
            return full and self is daemon.desk.store.blocks.environment

        monkeypatch.setattr("sessiond.storage.environment.Environment._low_on_space", is_low)
        monkeypatch.setattr("sessiond.storage.environment.Environment._reusable_bytes", lambda self: 0)
        monkeypatch.setattr(daemon.desk.store, "free_bytes", lambda: 0 if full else 1 << 40)
        async with peer_of(daemon.port) as peer:
            monkeypatch.setattr(daemon.desk.store, "require_space", lambda: None)
            session = (await peer.create(system="Be brief.")).session_id
            turn = await peer.turn(session, TEXT, max_tokens=4)
            assert len(turn.ids) == 4
            live = daemon.desk.live("default", session)
            await happens(lambda: live.unsaved)
            assert (await peer.get(session)).persisted_upto == 0
            full = False
            await peer.settled(session)


class TestAStoreThatTakesNoMoreWrites:
    async def test_says_so_and_refuses_repair_and_compaction(self, daemons: Daemons, capsys):
        daemon = await daemons.start(sweep_seconds=0.02)
        async with peer_of(daemon.port) as peer:
            session = await cold_session(peer)
            assert (await stats(peer)).gauges["store_read_only"] == 0
            daemon.desk.store.log.environment._failed = StoreReadOnly("a failed fsync")
            assert (await stats(peer)).gauges["store_read_only"] == 1
            assert (await verify(peer))[0] == []
            with refused("STORE_READ_ONLY", StatusCode.FAILED_PRECONDITION):
                await verify(peer, repair=True)
            with refused("STORE_READ_ONLY", StatusCode.FAILED_PRECONDITION):
                await compact(peer)
            assert (await peer.get(session)).session_id == session
            await asyncio.sleep(0.2)
            out, err = capsys.readouterr()
            assert (out + err).count("the store takes no more writes") == 1
            daemon.desk.store.log.environment._failed = None


async def test_the_command_line_verifies_repairs_and_compacts(peer: Peer, daemon, monkeypatch):
    await cold_session(peer)
    damage_cell(daemon)
    monkeypatch.setenv("SESSIOND_ADDRESS", f"127.0.0.1:{daemon.port}")

    def run(*arguments: str):
        return CliRunner().invoke(app, arguments)

    async def call(*arguments: str, status: int = 0) -> str:
        result = await asyncio.get_running_loop().run_in_executor(None, run, *arguments)
        assert result.exit_code == status, result.output
        return result.stdout

    found = await call("verify", "--json", status=1)
    assert '"checksum"' in found
    assert '"checksum"' in await call("verify", "--repair", "--json")
    last = json.loads((await call("verify", "--recompute", "1", "--json")).strip().splitlines()[-1])
    assert "findings" not in last["summary"] or not any(map(int, last["summary"]["findings"].values()))
    assert json.loads(await call("compact", "--json"))["after"]
