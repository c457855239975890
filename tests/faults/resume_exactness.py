"""Every way to resume a session continues it exactly: KV bytes, 64 greedy tokens and logits, only new tokens computed.

The same conversations are held in a daemon that nothing happens to, and in one where each is resumed in its way before
the last turn. Tiny real model; both daemons that say the last turn are in this process.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from e2e_archive import export, import_
from e2e_daemon import Peer, peer_of
from fake_daemon import model_folder
from kill_runner import Mortal
from outcome import Outcome
from step_hooks import StepHook
from weaknesses import WEAKNESSES

from sessiond.config import Settings
from sessiond.server import Daemon
from sessiond.storage.kv import kv_digest
from sessiond.types import Span
from sessiond.v1 import sessions_pb2, types_pb2

N_LAST = 64
BUDGET_BYTES = 1 << 20  # about 4,000 tokens of the tiny model
WORDS = ("alpha", "beta", "gamma", "delta", "word", "and", "then", "of")


@dataclass
class Conversation:
    """What is said before the last turn, and how the session is resumed."""

    way: str
    texts: list[str]
    last: str


@dataclass
class Last:
    """The last turn: what it said and computed, and the KV it left."""

    ids: list[int]
    logits: list[torch.Tensor]
    kv: str
    new: int
    prefilled: int
    lost: int

    def differs(self, other: Last) -> str:
        """How this one differs from the uninterrupted `other`; empty: not at all."""
        if self.ids != other.ids:
            return f"says {self.ids} instead of {other.ids}"
        if not all(torch.equal(ours, theirs) for ours, theirs in zip(self.logits, other.logits, strict=True)):
            return "has other logits"
        if self.kv != other.kv:
            return "has other KV"
        if (self.new, self.prefilled) != (other.new, other.prefilled) or self.lost:
            return f"computes {self.prefilled} tokens and not {other.prefilled}; {self.lost} were lost"
        return ""


class Recorder:
    """Stands before the model's step and keeps the logits."""

    def __init__(self, daemon: Daemon) -> None:
        assert daemon.desk is not None
        self.rows: list[torch.Tensor] = []
        StepHook(daemon.desk.engine.model, lambda feeds: None, self._recorded)

    def _recorded(self, logits: torch.Tensor) -> None:
        self.rows += [row.clone() for row in logits]


@dataclass
class Subject:
    """A daemon in this process, with what it takes to look inside."""

    daemon: Daemon
    peer: Peer
    recorder: Recorder

    async def say(self, session: str, text: str) -> Last:
        desk = self.daemon.desk
        assert desk is not None
        counters = desk.engine.counters
        before = counters.prefilled
        self.recorder.rows = []
        settings = desk.settings
        desk.settings = settings.model_copy(update={"settle_seconds": 60.0})  # nothing is sealed while it is looked at
        turn = await self.peer.turn(session, text, max_tokens=N_LAST)
        desk.settings = settings
        cache = desk.live("default", session).cache
        assert cache is not None
        return Last(
            turn.ids,
            list(self.recorder.rows),
            kv_digest(cache.arrays(Span(0, cache.length))),
            turn.accepted.prompt_tokens_new,
            counters.prefilled - before,
            turn.restored.tokens_recomputed if "restored" in turn.kinds else 0,
        )

    async def hold(self, conversation: Conversation) -> str:
        return await hold(self.peer, conversation)


async def hold(peer: Peer, conversation: Conversation) -> str:
    """All turns but the last, each settled before the next."""
    session = (await peer.create(system="Be brief.")).session_id
    for text in conversation.texts:
        await peer.turn(session, text, max_tokens=24)
        await peer.settled(session)
    return session


# --- ways -----------------------------------------------------------------------------------------------------------


async def hot(subject: Subject, session: str) -> str:
    return session


async def cold(subject: Subject, session: str) -> str:
    await subject.peer.suspend(session)
    return session


async def evicted(subject: Subject, session: str) -> str:
    """Others need the memory."""
    for attempt in range(40):
        ids = [3 + attempt, *range(4, 250), *range(4, 250)]
        other = (await subject.peer.create(token_ids=ids)).session_id
        await subject.peer.turn(other, "x", max_tokens=1)
        if (await subject.peer.get(session)).tier == types_pb2.TIER_COLD:
            return session
    raise AssertionError("the session does not leave memory")


async def forked(subject: Subject, session: str) -> str:
    request = sessions_pb2.ForkSessionRequest(session_id=session)
    return (await subject.peer.call(subject.peer.sessions.ForkSession, request)).session_id


async def forked_cold(subject: Subject, session: str) -> str:
    return await forked(subject, await cold(subject, session))


async def rolled_back(subject: Subject, session: str) -> str:
    head = (await subject.peer.get(session)).head_revision_id
    await subject.peer.turn(session, "Never said.", max_tokens=8)
    request = sessions_pb2.RollbackSessionRequest(session_id=session, revision_id=head)
    await subject.peer.call(subject.peer.sessions.RollbackSession, request)
    return session


async def imported(subject: Subject, archive: bytes) -> str:
    """From the daemon that is left alone."""
    done = await import_(subject.peer, archive)
    assert done.verdict == sessions_pb2.IMPORT_VERDICT_EXACT
    return done.session.session_id


# Those whose conversation is held in the daemon that says the last turn.
WAYS: dict[str, Callable[[Subject, str], Awaitable[str]]] = {
    "hot": hot,
    "cold": cold,
    "evicted": evicted,
    "forked": forked,
    "forked_cold": forked_cold,
    "rolled_back": rolled_back,
}
ALL_WAYS = ("restarted", "killed", "imported", *WAYS)


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    """`count` conversations, each resumed in one way. `variant`: see `WEAKNESSES`."""
    rng = random.Random(seed)
    conversations = [drawn(rng, ALL_WAYS[trial % len(ALL_WAYS)]) for trial in range(count)]
    with WEAKNESSES[variant]():
        details = asyncio.run(_run(conversations, scratch))
    return Outcome("resume_exactness", count, len(details), details=[f"seed {seed} {line}" for line in details])


def drawn(rng: random.Random, way: str) -> Conversation:
    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.choice((1, 6, 25, 40))))

    return Conversation(way, [text() for _ in range(rng.randint(1, 3))], text())


async def _run(conversations: list[Conversation], scratch: Path) -> list[str]:
    settings: dict[str, Any] = {
        "model": str(model_folder()), "listen": "127.0.0.1:0", "threads": 1, "settle_seconds": 0.02,
        "sweep_seconds": 3600.0,
    }  # fmt: skip
    expected: list[Last] = []
    archives: dict[int, bytes] = {}
    async with _subject(settings | {"data_dir": scratch / "alone"}) as alone:
        for at, one in enumerate(conversations):
            session = await alone.hold(one)
            if one.way == "imported":
                archives[at], _ = await export(alone.peer, session, all_revisions=at % 2 == 1)
            expected.append(await alone.say(session, one.last))
    settings |= {"data_dir": scratch / "data", "memory_budget_bytes": BUDGET_BYTES}
    sessions: dict[int, str] = {}
    async with _subject(settings) as first:
        await _hold_those(first.peer, conversations, "restarted", sessions)
    if any(one.way == "killed" for one in conversations):
        doomed = Mortal(scratch, settings)
        assert doomed.port is not None, doomed.report()
        async with peer_of(doomed.port) as peer:
            await _hold_those(peer, conversations, "killed", sessions)
            doomed.kill()
    details = []
    async with _subject(settings) as subject:
        for at, archive in archives.items():
            sessions[at] = await imported(subject, archive)
        for at, one in enumerate(conversations):
            session = sessions.get(at) or await WAYS[one.way](subject, await subject.hold(one))
            if difference := (await subject.say(session, one.last)).differs(expected[at]):
                details.append(f"trial {at} {one.way}: the last turn {difference}")
    return details


async def _hold_those(peer: Peer, conversations: list[Conversation], way: str, sessions: dict[int, str]) -> None:
    for at, one in enumerate(conversations):
        if one.way == way:
            sessions[at] = await hold(peer, one)


@asynccontextmanager
async def _subject(settings: dict[str, Any]) -> Any:
    daemon = Daemon(Settings(**settings))
    await daemon.start()
    try:
        async with peer_of(daemon.port) as peer:
            yield Subject(daemon, peer, Recorder(daemon))
    finally:
        await daemon.stop()
