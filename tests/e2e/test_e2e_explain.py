"""What a turn read, asked for behind it: by layer and head, by form and tier, where, how well, and how long it took."""

from __future__ import annotations

import time

import pytest
from e2e_daemon import Daemons, Gate, Peer, peer_of, refused
from grpc import StatusCode
from small_policies import SMALL
from test_e2e_damage import damage, reference
from test_e2e_detach import suspend_one, until_state

from sessiond.policies.window import WindowSelector
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2 as types

N = 8
LONG = "word " * 70 + "one"
LAYERS, HEADS, TOKEN_BYTES = 2, 2, 2 * 8 * 4  # of the tiny chat model; of a token in one head


async def explain(peer: Peer, session_id: str, **fields) -> list[pb.TurnExplanation]:
    request = pb.ExplainTurnRequest(session_id=session_id, **fields)
    return list((await peer.call(peer.sessions.ExplainTurn, request)).turns)


async def explained(peer: Peer, session_id: str) -> pb.TurnExplanation:
    (turn,) = await explain(peer, session_id)
    return turn


def spans(read: pb.AttentionRead) -> list[tuple[int, int]]:
    return [(span.start, span.end) for span in read.spans]


async def begun(peer: Peer, **options) -> str:
    session_id = (await peer.create(system="Be brief.", **options)).session_id
    await peer.turn(session_id, LONG, max_tokens=N)
    return session_id


async def test_full_reads_everything_exactly_at_every_step(peer: Peer):
    session = await begun(peer)
    before = time.time()
    turn = await peer.turn(session, "And two", max_tokens=N, request_id="r2")
    told = await explained(peer, session)
    assert (told.revision_id, told.request_id) == (turn.finished.revision_id, "r2")
    assert told.policy.name == "full"
    assert told.context_tokens == turn.finished.committed_tokens
    assert told.steps == 1 + N - 1  # the last token is not fed
    assert before <= told.start_time.ToMicroseconds() / 1e6 <= time.time()
    end = turn.finished.committed_tokens - 1
    ends = range(end - N + 1, end + 1)
    assert [(read.layer, read.head_start, read.n_heads) for read in told.reads] == [(0, 0, HEADS), (1, 0, HEADS)]
    for read in told.reads:
        assert (read.tokens_available, read.tokens_attended, spans(read)) == (end, end, [(0, end)])
        assert read.mean_tokens_attended == sum(ends) / N
        assert read.attention_mass == 1
        (view,) = read.views
        assert (view.view, view.tier, view.tokens) == ("exact", types.TIER_HOT, sum(ends))
        assert view.bytes == sum(ends) * HEADS * TOKEN_BYTES
    width = told.read_range_tokens
    by_range = [
        sum(e > p for p in range(start, min(start + width, end)) for e in ends) for start in range(0, end, width)
    ]
    assert list(told.read_share) == pytest.approx([n / sum(ends) for n in by_range])
    assert len(by_range) <= 64


async def test_window_reads_the_sinks_and_the_newest_tokens(peer: Peer):
    session = await begun(peer)
    turn = await peer.turn(session, "And two", max_tokens=N, policy={"name": "window", "sinks": 3, "recent": 100})
    told = await explained(peer, session)
    assert dict(told.policy.knobs) == {"sinks": 3, "recent": 100}
    end, n_piece = turn.finished.committed_tokens - 1, turn.accepted.prompt_tokens_new
    for read in told.reads:
        assert spans(read) == [(0, 3), (end - 100, end)]
        assert (read.tokens_attended, read.tokens_available) == (103, end)
        # The prompt is one piece, and what its first token may see is read for all of them.
        assert read.mean_tokens_attended == (103 * N + n_piece - 1) / N
        assert [(view.view, view.tokens) for view in read.views] == [("exact", 103 * N + n_piece - 1)]
    ranges = [i * told.read_range_tokens for i, share in enumerate(told.read_share) if share]
    assert all(start < 3 or start >= end - 100 - N - n_piece - told.read_range_tokens for start in ranges)
    assert 0 in ranges
    assert list(told.notes) == []


async def test_sieve_reads_its_index_and_what_that_points_at(peer: Peer):
    session = await begun(peer)
    turn = await peer.turn(session, "And two", max_tokens=N, policy={"name": "sieve", "least": 4, "most": 16})
    told = await explained(peer, session)
    end = turn.finished.committed_tokens - 1
    assert len(told.reads) == LAYERS * HEADS  # every head chooses for itself
    for read in told.reads:
        exact, index = read.views
        indexed = sum(range(end - N + 2, end + 1))
        assert (index.tokens, index.bytes) == (indexed, indexed * (8 * 4 // 8 + 4))  # codes, scale and zero
        assert index.view != "exact"
        own = turn.finished.usage.generated_tokens + turn.accepted.prompt_tokens_new - 1
        assert own + 4 <= read.tokens_attended <= own + 16 < end
        assert sum(end - start for start, end in spans(read)) == read.tokens_attended
        assert 0 < read.attention_mass < 1
        assert exact.tokens < sum(range(end - N + 1, end + 1))
    assert sum(told.read_share) == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(SMALL))
async def test_every_policy_is_told_with_all_its_knobs(peer: Peer, name: str):
    session = await begun(peer)
    await peer.turn(session, "And two", max_tokens=N, policy={"name": name, **SMALL[name]})
    told = await explained(peer, session)
    if name == "auto":
        assert told.policy.name == "sieve"  # what it settled on
    else:
        assert told.policy.name == name
        assert set(told.policy.knobs) >= set(SMALL[name])
    assert sum(told.read_share) == pytest.approx(1)
    for read in told.reads:
        assert 0 < read.tokens_attended <= read.tokens_available
        assert 0 <= read.attention_mass <= 1


async def test_time_is_told_by_phase(peer: Peer):
    session = await begun(peer)
    began = time.perf_counter()
    await peer.turn(session, "And two", max_tokens=N, policy={"name": "sieve", "least": 4, "most": 16})
    took = (time.perf_counter() - began) * 1e3
    spent = dict((await explained(peer, session)).milliseconds_by_phase)
    assert set(spent) == {"queue", "restore", "prefill", "decode", "select", "commit"}
    assert all(spent[phase] > 0 for phase in ("queue", "prefill", "decode", "select", "commit"))
    assert spent["select"] < spent["prefill"] + spent["decode"]
    assert sum(spent.values()) - spent["select"] < took


async def test_recomputation_is_told_with_its_reason(peer: Peer, daemon):
    session = await begun(peer)
    await peer.settled(session)
    await peer.suspend(session)
    damage(daemon, reference(daemon, "cell", (await peer.get(session)).head_revision_id))
    turn = await peer.turn(session, "And?", max_tokens=N)
    told = await explained(peer, session)
    assert told.restored == turn.restored
    assert [reason.reason for reason in told.restored.reasons] == [pb.RECOMPUTE_CAUSE_CORRUPT]
    assert told.restored.tokens_recomputed > 128
    assert told.milliseconds_by_phase["restore"] > 0


async def test_a_policy_that_failed_is_told_with_its_reason(peer: Peer, monkeypatch):
    session = await begun(peer)

    def broken(self, view):
        raise RuntimeError("no answer")

    monkeypatch.setattr(WindowSelector, "prompt", broken)
    turn = await peer.turn(session, "And two", max_tokens=N, policy={"name": "window"})
    told = await explained(peer, session)
    assert list(told.notes) == list(turn.finished.notices) != []
    assert {read.tokens_attended for read in told.reads} == {told.context_tokens - 1}


async def test_a_policy_that_left_nothing_out_says_so(peer: Peer):
    session = await begun(peer)
    await peer.turn(session, "And two", max_tokens=N, policy={"name": "window", "recent": 4000})
    assert any("nothing out" in note for note in (await explained(peer, session)).notes)


class TestWhatIsRemembered:
    async def test_the_last_turns_newest_first(self, peer: Peer):
        session = await begun(peer)
        heads = [(await peer.turn(session, "More", max_tokens=2)).finished.revision_id for _ in range(3)]
        assert [turn.revision_id for turn in await explain(peer, session, last_turns=3)] == heads[::-1]
        assert len(await explain(peer, session, last_turns=100)) == 4
        assert [turn.revision_id for turn in await explain(peer, session, revision_id=heads[1])] == [heads[1]]

    async def test_a_turn_that_appended_only_has_read_nothing(self, peer: Peer):
        session = await begun(peer)
        await peer.turn(session, "Note this", mode="append_only")
        told = await explained(peer, session)
        assert (told.steps, list(told.reads), list(told.read_share)) == (0, [], [])
        assert told.revision_id == (await peer.get(session)).head_revision_id

    async def test_a_fork_knows_the_turns_before_it(self, peer: Peer):
        session = await begun(peer)
        fork = await peer.call(peer.sessions.ForkSession, pb.ForkSessionRequest(session_id=session))
        head = fork.head_revision_id
        assert [turn.revision_id for turn in await explain(peer, fork.session_id, revision_id=head)] == [head]
        assert await explain(peer, fork.session_id) == []

    async def test_nothing_after_a_restart(self, daemons: Daemons):
        daemon = await daemons.start()
        async with peer_of(daemon.port) as peer:
            session = await begun(peer)
            head = (await peer.get(session)).head_revision_id
            assert await explain(peer, session, revision_id=head) != []
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as peer:
            assert await explain(peer, session) == []
            assert await explain(peer, session, revision_id=head) == []

    async def test_nothing_of_a_session_that_was_deleted(self, peer: Peer, daemon):
        session, other = await begun(peer), await begun(peer)
        await peer.delete(session)
        assert await explain(peer, session) == []
        await peer.delete(session, purge_now=True)
        with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
            await explain(peer, session)
        await peer.delete(other, purge_now=True)
        assert len(daemon.desk.explanations) == 0

    async def test_no_other_tenants_sessions_and_revisions(self, daemons: Daemons):
        daemon = await daemons.start(trust_tenant_metadata=True)
        async with peer_of(daemon.port, tenant="a") as a, peer_of(daemon.port, tenant="b") as b:
            session, theirs = await begun(a), await begun(b)
            with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
                await explain(b, session)
            head = (await a.get(session)).head_revision_id
            with refused("REVISION_NOT_FOUND", StatusCode.NOT_FOUND):
                await explain(b, theirs, revision_id=head)
            with refused("REVISION_NOT_FOUND", StatusCode.NOT_FOUND):
                await explain(a, session, revision_id="none")

    async def test_a_suspended_turn_has_no_revision_until_it_is_committed(self, daemons: Daemons):
        daemon = await daemons.start(detached_turn_seconds=0.0)
        async with peer_of(daemon.port) as peer:
            session = await begun(peer)
            gate = Gate(daemon)
            await suspend_one(peer, gate, session, "r2")
            gate.open()
            told = await explained(peer, session)
            assert (told.revision_id, told.request_id) == ("", "r2")
            assert told.reads[0].tokens_attended > 0
            abort = pb.AbortTurnRequest(session_id=session, request_id="r2", commit=True)
            revision = (await peer.call(peer.sessions.AbortTurn, abort)).revision_id
            assert (await explained(peer, session)).revision_id == revision != ""

    async def test_a_turn_that_goes_on_replaces_what_was_told_before(self, daemons: Daemons):
        daemon = await daemons.start(detached_turn_seconds=0.0)
        async with peer_of(daemon.port) as peer:
            session = await begun(peer)
            gate = Gate(daemon)
            await suspend_one(peer, gate, session, "r2")
            gate.open()
            stream = peer.open(session, "Tell me", max_tokens=40, request_id="r2")
            revision = (await stream.read()).finished.revision_id
            await until_state(peer, session)
            turns = await explain(peer, session, last_turns=9)
            assert [turn.revision_id for turn in turns][:1] == [revision]
            assert len(turns) == 2
            assert any("went on" in note for note in turns[0].notes)
