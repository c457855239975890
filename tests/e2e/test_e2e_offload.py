"""Sessions whose policy reads little of their exact KV keep it in a file, and move when that changes."""

from __future__ import annotations

from typing import Any

import pytest
from e2e_daemon import Daemons, Peer, patience, peer_of
from engine_harness import digest
from small_policies import SMALL

from sessiond.backing import files_supported
from sessiond.cache import SessionCache
from sessiond.errors import DiskFull
from sessiond.server import Daemon
from sessiond.storage import space
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2

pytestmark = pytest.mark.skipif(not files_supported(), reason="this system cannot set a file's space aside")

N = 12
TEXTS = ("word " * 70 + "one", "And two", "word " * 40 + "three")
SIEVE: dict[str, Any] = {"name": "sieve", **SMALL["sieve"]}


def cache_of(daemon: Daemon, session: str) -> SessionCache:
    cache = daemon.desk.live("default", session).cache
    assert cache is not None
    return cache


async def lies_in_a_file(daemon: Daemon, session: str, wanted: bool) -> None:
    settling = daemon.desk.live("default", session).settling
    assert settling is not None
    async with patience(lambda: f"offloaded is {cache_of(daemon, session).is_offloaded}"):
        await settling
    assert cache_of(daemon, session).is_offloaded == wanted


async def test_such_a_session_answers_as_one_in_memory_and_takes_less_of_it(daemons: Daemons):
    answers, taken = [], []
    for offload in (True, False):
        daemon = await daemons.start(offload=offload, data_dir=daemons.settings["data_dir"] / str(offload))
        async with peer_of(daemon.port) as peer:
            session = (await peer.create(system="Be brief.", policy=SIEVE)).session_id
            answers.append([(await peer.turn(session, text, max_tokens=N)).ids for text in TEXTS])
            await peer.settled(session)
            cache = cache_of(daemon, session)
            assert cache.is_offloaded == offload
            taken.append(cache.nbytes)
            assert daemon.desk.hot_bytes == cache.nbytes
    assert answers[0] == answers[1]
    assert taken[0] < taken[1] * 0.8


async def test_it_moves_when_the_sessions_policy_changes(peer: Peer, daemon: Daemon):
    session = (await peer.create(system="Be brief.")).session_id
    await peer.turn(session, TEXTS[0], max_tokens=N)
    assert not cache_of(daemon, session).is_offloaded
    found = await peer.get(session)
    found.policy.name = "sieve"
    await peer.update(found, "policy")
    await peer.turn(session, TEXTS[1], max_tokens=N)
    await lies_in_a_file(daemon, session, True)
    await peer.turn(session, TEXTS[1], max_tokens=N, policy="full")  # one turn's own policy moves nothing
    await peer.settled(session)
    assert cache_of(daemon, session).is_offloaded
    found = await peer.get(session)
    found.policy.name = "full"
    await peer.update(found, "policy")
    await peer.turn(session, TEXTS[2], max_tokens=N)
    await lies_in_a_file(daemon, session, False)
    plain = (await peer.create(system="Be brief.")).session_id
    await peer.turn(plain, TEXTS[0], max_tokens=N)
    await peer.settled(session)


@pytest.mark.parametrize("name", ["sieve", "int4", "kivi", "shadowkv"])
async def test_behind_a_turn_its_index_catches_up_with_all_that_was_said(peer: Peer, daemon: Daemon, name: str):
    session = (await peer.create(system="Be brief.", policy={"name": name, **SMALL[name]})).session_id
    for text in TEXTS[:2]:
        await peer.turn(session, text, max_tokens=N)
    live = daemon.desk.live("default", session)
    before = live.cache.selection.nbytes, live.cache.selection.turn_start
    await live.settling
    assert live.cache.selection.failure is None
    selector = live.cache.selection._selectors[1]
    covered = {
        "sieve": lambda: selector._index.n,
        "int4": lambda: selector._copy._keys.n,
        "kivi": lambda: selector._values.n + SMALL["kivi"]["residual"] + SMALL["kivi"]["group"],
        "shadowkv": lambda: selector._factors.n,
    }[name]()
    assert covered >= live.cache.length > before[1]


async def test_without_disk_space_it_stays_in_memory(daemons: Daemons, monkeypatch: pytest.MonkeyPatch):
    daemon = await daemons.start()
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.", policy=SIEVE)).session_id
        real = space.is_short
        monkeypatch.setattr("sessiond.cachememory.is_short", lambda folder, n: real(folder, n + (1 << 60)))
        turn = await peer.turn(session, TEXTS[0], max_tokens=N)
        assert turn.finished.usage.generated_tokens == N
        assert not cache_of(daemon, session).is_offloaded


async def test_it_survives_a_restart(daemons: Daemons):
    daemon = await daemons.start()
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.", policy=SIEVE)).session_id
        await peer.turn(session, TEXTS[0], max_tokens=N)
        await peer.settled(session)
    daemon = await daemons.restart(daemon)
    async with peer_of(daemon.port) as peer:
        turn = await peer.turn(session, TEXTS[1], max_tokens=N)
        assert turn.restored.tokens_restored > 0
        assert turn.restored.tokens_recomputed == 0
        assert cache_of(daemon, session).is_offloaded


async def test_reads_are_told_as_from_disk_and_auto_says_why_it_chose(peer: Peer, daemon: Daemon):
    session = (await peer.create(system="Be brief.", policy={"name": "auto", **SMALL["auto"]})).session_id
    for text in TEXTS:
        turn = await peer.turn(session, text, max_tokens=N)
    assert turn.finished.memory_bytes_by_tier["disk"] > turn.finished.memory_bytes_by_tier["device"] > 0
    request = pb.ExplainTurnRequest(session_id=session)
    told = (await peer.call(peer.sessions.ExplainTurn, request)).turns[0]
    assert told.policy.name == "sieve"
    assert [note.split(":")[0] for note in told.notes] == ["auto"]
    exact = [view.tier for read in told.reads for view in read.views if view.view == "exact"]
    assert exact
    assert set(exact) == {types_pb2.TIER_COLD}
    masses = [read.attention_mass for read in told.reads if read.HasField("attention_mass")]
    assert masses
    assert all(0 < mass <= 1.001 for mass in masses)
    assert daemon.desk.live("default", session).attention_mass == pytest.approx(sum(masses) / len(masses), abs=0.05)


async def rolled_back_to_its_head(peer: Peer, session: str) -> None:
    """Settles a session without a step."""
    head = (await peer.get(session)).head_revision_id
    await peer.call(peer.sessions.RollbackSession, pb.RollbackSessionRequest(session_id=session, revision_id=head))


@pytest.mark.parametrize("name", ["sieve", "kvzip"])
@pytest.mark.parametrize("offload", [True, False])
async def test_kv_that_was_restored_is_still_there_after_it_was_moved_or_scored(
    daemons: Daemons, name: str, offload: bool
):
    """No step has written it: a move that copied only what steps wrote would leave zeros, and seal cells on them."""
    daemon = await daemons.start(offload=offload)
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, TEXTS[0], max_tokens=N)
        await peer.settled(session)
        before = digest(cache_of(daemon, session), 0, cache_of(daemon, session).length)
        await peer.suspend(session)
        await peer.warm(session)
        found = await peer.get(session)
        found.policy.name = name
        await peer.update(found, "policy")
        await rolled_back_to_its_head(peer, session)
        live = daemon.desk.live("default", session)
        await live.settling
        assert live.cache.is_offloaded == offload
        assert (live.cache.prior is not None) == (name == "kvzip")
        assert digest(live.cache, 0, live.cache.length) == before


async def test_one_that_does_not_fit_in_memory_stays_in_its_file_and_pushes_nobody_out(daemons: Daemons):
    daemon = await daemons.start()
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.", policy=SIEVE)).session_id
        await peer.turn(session, TEXTS[0], max_tokens=N)
        other = (await peer.create(system="Be brief.")).session_id
        await peer.turn(other, "Hi", max_tokens=2)
        exact = cache_of(daemon, session).length * daemon.desk.tiers.shape.bytes_per_token
        settings = daemon.desk.settings.model_copy(update={"memory_budget_bytes": daemon.desk.hot_bytes + exact // 2})
        daemon.desk.settings = settings
        found = await peer.get(session)
        found.policy.CopyFrom(types_pb2.Policy(name="full"))
        await peer.update(found, "policy")
        await rolled_back_to_its_head(peer, session)
        await daemon.desk.live("default", session).settling
        assert cache_of(daemon, session).is_offloaded
        assert cache_of(daemon, other)
        assert (await peer.turn(session, TEXTS[1], max_tokens=N)).finished.usage.generated_tokens == N


async def test_a_full_disk_lets_offloaded_sessions_leave_all_the_same(daemons: Daemons, monkeypatch):
    daemon = await daemons.start(settle_seconds=600)
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.", policy=SIEVE)).session_id
        first = await peer.turn(session, TEXTS[0], max_tokens=N)

        def full(*args: Any, **options: Any) -> Any:
            raise DiskFull("no room")

        with monkeypatch.context() as patched:
            patched.setattr(daemon.desk.tiers, "persist_cells", full)
            assert (await peer.suspend(session)).bytes_freed > 0
        turn = await peer.turn(session, TEXTS[1], max_tokens=N)
        assert turn.restored.tokens_recomputed > 0
        assert first.finished.usage.generated_tokens == turn.finished.usage.generated_tokens == N
