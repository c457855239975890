"""A daemon on quantized weights: the same service, another identity."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from e2e_archive import export, import_
from e2e_daemon import Daemons, Peer, peer_of, refused
from grpc import StatusCode
from test_e2e_branches import fork

from sessiond.modelweights import BlockLinear
from sessiond.v1 import admin_pb2
from sessiond.v1 import sessions_pb2 as pb

TEXT = "word " * 60


@pytest.fixture(params=["int8", "int4"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def quantized(daemons: Daemons, tmp_path: Path, kind: str) -> AsyncIterator[Peer]:
    daemon = await daemons.start(data_dir=tmp_path / "quantized", weights=kind)
    async with peer_of(daemon.port) as peer:
        yield peer


async def talked(peer: Peer) -> str:
    session = (await peer.create(system="Be brief.")).session_id
    await peer.turn(session, TEXT, max_tokens=20)
    await peer.settled(session)
    return session


async def test_it_computes_with_the_quantized_matrices_and_says_so(daemons: Daemons, quantized: Peer, kind: str):
    (daemon,) = daemons.running
    assert isinstance(daemon.desk.engine.model.module.model.layers[0].mlp.up_proj, BlockLinear)
    info = await quantized.call(quantized.admin.GetServerInfo, admin_pb2.GetServerInfoRequest())
    assert f'"kind":"{kind}"' in info.identity.fields["quantization"]
    assert "layers" in info.numerics_profile.fields


async def test_a_session_resumes_exactly_after_a_restart(daemons: Daemons, tmp_path: Path, quantized: Peer, kind: str):
    session, twin = await talked(quantized), await talked(quantized)
    expected = await quantized.turn(twin, "Go on", max_tokens=40)
    (daemon,) = daemons.running
    daemon = await daemons.restart(daemon, data_dir=tmp_path / "quantized", weights=kind)
    async with peer_of(daemon.port) as again:
        turn = await again.turn(session, "Go on", max_tokens=40)
        assert (turn.ids, turn.restored.tokens_recomputed) == (expected.ids, 0)


async def test_sessions_of_other_weights_are_refused_and_forked_with_recompute(daemons, daemon, peer: Peer, kind: str):
    session = await talked(peer)
    daemon = await daemons.restart(daemon, weights=kind)
    async with peer_of(daemon.port) as now:
        with refused("IDENTITY_MISMATCH", StatusCode.FAILED_PRECONDITION) as caught:
            await now.turn(session, "Go on", max_tokens=4)
        assert caught.value.metadata["field"] == "quantization"
        moved = await fork(now, session, recompute=True)
        turn = await now.turn(moved.session_id, "Go on", max_tokens=4)
        assert {reason.reason for reason in turn.restored.reasons} == {pb.RECOMPUTE_CAUSE_IDENTITY}
    daemon = await daemons.restart(daemon)
    async with peer_of(daemon.port) as again:
        assert (await again.turn(session, "Go on", max_tokens=4)).restored.tokens_recomputed == 0


async def test_an_archive_of_other_weights_is_refused_or_computed_again(peer: Peer, quantized: Peer):
    archive, header = await export(peer, await talked(peer))
    with refused("IDENTITY_MISMATCH", StatusCode.FAILED_PRECONDITION) as caught:
        await import_(quantized, archive)
    assert caught.value.metadata["field"] == "quantization"
    done = await import_(quantized, archive, allow_recompute=True)
    assert (done.verdict, list(done.differing_fields)) == (pb.IMPORT_VERDICT_RECOMPUTE, ["quantization"])
    turn = await quantized.turn(done.session.session_id, "Go on", max_tokens=4)
    assert [(r.reason, r.tokens) for r in turn.restored.reasons] == [(pb.RECOMPUTE_CAUSE_IDENTITY, header.n_tokens)]
