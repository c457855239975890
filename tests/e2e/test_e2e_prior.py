"""A session's scores: made in idle time, there again after a restart and in forks, gone with their session."""

from __future__ import annotations

import asyncio

import pytest
from e2e_daemon import PATIENCE, Daemons, Peer, peer_of
from small_policies import SMALL
from test_e2e_damage import damage

from sessiond.cache import SessionCache
from sessiond.policies.prior import ALWAYS, Prior
from sessiond.server import Daemon
from sessiond.storage import keys
from sessiond.v1 import sessions_pb2 as pb

N = 12
LONG = "word " * 70 + "one"
KVZIP = {"name": "kvzip", **SMALL["kvzip"]}


def cache_of(daemon: Daemon, session: str) -> SessionCache:
    cache = daemon.desk.lives["default", session].cache
    assert cache is not None
    return cache


async def scored(daemon: Daemon, peer: Peer, session: str) -> str:
    """Wait until scores are stored with the session's head; returns that."""
    head = (await peer.get(session)).head_revision_id
    async with asyncio.timeout(PATIENCE):
        while daemon.desk.store.log.prior("default", head) is None:  # noqa: ASYNC110 - the daemon's doing
            await asyncio.sleep(0.02)
    return head


async def one_scored(daemon: Daemon, peer: Peer) -> tuple[str, Prior]:
    session = (await peer.create(system="Be brief.", policy=KVZIP)).session_id
    await peer.turn(session, LONG, max_tokens=N)
    await scored(daemon, peer, session)
    prior = cache_of(daemon, session).prior
    assert prior is not None
    return session, prior


async def test_what_a_turn_attends_to_is_what_the_scores_keep(peer: Peer, daemon):
    session, prior = await one_scored(daemon, peer)
    cache = cache_of(daemon, session)
    assert prior.n == cache.length == (await peer.get(session)).token_count - 1
    root, _ = daemon.desk.store.log.chain("default", (await peer.get(session)).head_revision_id)
    assert root.position_end > 4
    assert (prior.scores == ALWAYS).nonzero()[:, 2].unique().tolist() == list(range(root.position_end))
    turn = await peer.turn(session, "And two", max_tokens=N)
    assert list(turn.finished.notices) == []
    kept = prior.kept(0.3, "pair")
    for layer, selector in enumerate(cache_of(daemon, session).selection._selectors):
        chosen = {(g, p) for g, row in enumerate(selector._chosen.tolist()) for p in row if 0 <= p < prior.n}
        assert chosen == {(g, p) for g, p in kept[layer].nonzero().tolist()}


async def test_another_policy_is_not_scored_for(peer: Peer, daemon):
    session = (await peer.create(system="Be brief.")).session_id
    await peer.turn(session, LONG, max_tokens=N)
    await peer.settled(session)
    await peer.suspend(session)
    assert daemon.desk.engine.counters.probed == 0


async def test_scores_survive_suspending_and_a_restart_and_forks_have_them(daemons: Daemons):
    daemon = await daemons.start()
    async with peer_of(daemon.port) as peer:
        session, prior = await one_scored(daemon, peer)
        branch = (await peer.call(peer.sessions.ForkSession, pb.ForkSessionRequest(session_id=session))).session_id
        await peer.suspend(session)
        await peer.warm(session)
        assert cache_of(daemon, session).prior.scores.equal(prior.scores)
    daemon = await daemons.restart(daemon)
    async with peer_of(daemon.port) as peer:
        for one in (session, branch):
            await peer.turn(one, "Hi", max_tokens=2)  # too few tokens for another probe
            await peer.settled(one)
            assert cache_of(daemon, one).prior.scores.equal(prior.scores)
            assert cache_of(daemon, one).selection.prior is cache_of(daemon, one).prior
            await peer.suspend(one)
        assert daemon.desk.engine.counters.probed == 0


async def test_later_turns_add_to_them_and_a_rollback_takes_away(peer: Peer, daemon):
    session, prior = await one_scored(daemon, peer)
    first = (await peer.get(session)).head_revision_id
    await peer.turn(session, LONG, max_tokens=N)
    await scored(daemon, peer, session)
    more = cache_of(daemon, session).prior
    assert more.n == cache_of(daemon, session).length > prior.n
    assert more.scores[:, :, : prior.n].equal(prior.scores)
    await peer.suspend(session)
    request = pb.RollbackSessionRequest(session_id=session, revision_id=first, request_id="back")
    await peer.call(peer.sessions.RollbackSession, request)
    await peer.warm(session)
    assert cache_of(daemon, session).prior.scores.equal(prior.scores)


async def test_damaged_scores_are_made_again(peer: Peer, daemon):
    session, prior = await one_scored(daemon, peer)
    head = (await peer.get(session)).head_revision_id
    await peer.suspend(session)
    damage(daemon, keys.record_key("default", keys.PRIOR, head))
    turn = await peer.turn(session, "And two", max_tokens=N)
    assert list(turn.finished.notices) == []
    assert cache_of(daemon, session).selection.prior is None
    await scored(daemon, peer, session)
    assert cache_of(daemon, session).prior.n > prior.n


@pytest.mark.parametrize("suspended", [False, True])
async def test_they_are_erased_with_their_session(peer: Peer, daemon, suspended: bool):
    session, _ = await one_scored(daemon, peer)
    if suspended:
        await peer.suspend(session)
    await peer.delete(session, purge_now=True)
    assert daemon.desk.store.log.tenants() == []
