"""Daemons on a model that the compiled kernels take: sessions beside each other, and a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from e2e_daemon import Daemons, Gate, Peer, Turn, peer_of
from e2e_model import NO_END, write_chat_model
from kernel_marks import needs_build
from kernel_spy import KernelSpy
from step_hooks import StepHook

from sessiond.server import Daemon

pytestmark = needs_build

LONG = 40
SAMPLINGS = [{}, {"temperature": 3.0, "seed": 7, "logit_bias": NO_END}]
SYSTEMS = ["Be brief.", "Be " + "very " * 40 + "brief.", "Be long."]
TEXTS = ["Tell me", "Go on", "The last question"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "tiny-kernels", for_kernels=True)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> KernelSpy:
    return KernelSpy(monkeypatch)


async def opened(peer: Peer, system: str) -> str:
    return (await peer.create(system=system)).session_id


async def converse(peer: Peer, session: str, texts: list[str], **options) -> list[Turn]:
    turns = []
    for text in texts:
        turns.append(await peer.turn(session, text, max_tokens=LONG, **options))
        await peer.settled(session)
    return turns


async def each_alone(peer: Peer, **options) -> list[list[list[int]]]:
    """The tokens of each session's turns, one session after the other."""
    return [
        [turn.ids for turn in await converse(peer, await opened(peer, system), TEXTS, **options)] for system in SYSTEMS
    ]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
async def test_sessions_answer_the_same_alone_and_together(daemon, peer: Peer, kernels, sampling):
    alone = await each_alone(peer, **sampling)
    sessions = [await opened(peer, system) for system in SYSTEMS]
    packed = []
    StepHook(daemon.desk.engine.model, lambda feeds: packed.append(len(feeds)))
    for number, text in enumerate(TEXTS):
        gate = Gate(daemon)  # until all three wait, none goes ahead
        kernels.take()
        streams = [peer.open(session, text, max_tokens=LONG, **sampling) for session in sessions]
        await gate.reached()
        while len(daemon.desk.turns) < len(sessions):  # noqa: ASYNC110 - another task's doing
            await asyncio.sleep(0.01)
        gate.open()
        turns = [await stream.read() for stream in streams]
        assert [turn.ids for turn in turns] == [ids[number] for ids in alone]
        assert kernels.take() > 0
        for session in sessions:
            await peer.settled(session)
    assert packed.count(len(sessions)) > len(TEXTS) * LONG // 2


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
async def test_a_restart_changes_no_answer(daemons: Daemons, tmp_path, kernels, sampling):
    daemon = await daemons.start(data_dir=tmp_path / "undisturbed")
    async with peer_of(daemon.port) as peer:
        whole = await each_alone(peer, **sampling)
    await daemons.stop(daemon)
    daemon = await daemons.start()
    async with peer_of(daemon.port) as peer:
        sessions = [await opened(peer, system) for system in SYSTEMS]
        before = [await converse(peer, session, TEXTS[:2], **sampling) for session in sessions]
    daemon = await daemons.restart(daemon)
    async with peer_of(daemon.port) as peer:
        kernels.take()
        after = await asyncio.gather(
            *(peer.turn(session, TEXTS[2], max_tokens=LONG, **sampling) for session in sessions)
        )
    assert kernels.take() > 0
    for turns, last, expected in zip(before, after, whole, strict=True):
        assert last.restored.tokens_recomputed == 0
        assert [turn.ids for turn in [*turns, last]] == expected


def bits_of(daemon: Daemon) -> list[int]:
    """Bits of the codes that the compiled decoder has of a layer's matrices, and of the output."""
    fused = daemon.desk.engine.model._fused
    assert fused is not None, "it goes through the compiled decoder"
    layer = fused.decoder.layers[-1]
    return [matrix.bits for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down, fused.decoder.head)]


async def test_a_restart_changes_no_answer_of_four_bits(daemons: Daemons, tmp_path, kernels):
    daemon = await daemons.start(data_dir=tmp_path / "undisturbed", weights="int4")
    async with peer_of(daemon.port) as peer:
        whole = await converse(peer, await opened(peer, SYSTEMS[1]), TEXTS)
    await daemons.stop(daemon)
    daemon = await daemons.start(weights="int4")
    async with peer_of(daemon.port) as peer:
        session = await opened(peer, SYSTEMS[1])
        turns = await converse(peer, session, TEXTS[:2])
    daemon = await daemons.restart(daemon, weights="int4")
    assert bits_of(daemon) == [4, 4, 4, 4, 8]
    async with peer_of(daemon.port) as peer:
        kernels.take()
        turns.append(await peer.turn(session, TEXTS[2], max_tokens=LONG))
        assert kernels.take() > LONG
    assert turns[2].restored.tokens_recomputed == 0
    assert [turn.ids for turn in turns] == [turn.ids for turn in whole]
