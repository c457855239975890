"""Turns whose stream is dropped at a random message and that are asked for again: each runs once, none reads otherwise.

A real daemon over gRPC on the fake model; many sessions at once, one turn at a time in each.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from e2e_daemon import Peer, Stream, peer_of
from fake_daemon import model_folder
from fake_model import FakeModel, answer_to, text_of
from outcome import Outcome
from weaknesses import WEAKNESSES

from sessiond import server
from sessiond.branch import read_branch
from sessiond.clients.errors import SessiondClientError
from sessiond.config import Settings
from sessiond.storage.records import RequestRecord
from sessiond.v1 import sessions_pb2, types_pb2

SESSIONS = 24
MAX_TOKENS = 16
CONTEXT_LIMIT = 900  # a session that has grown to this ends, and another begins
STEP_SECONDS = 0.004
DETACHED_SECONDS = 0.01


@dataclass
class Conversation:
    """A session and what it must hold: its committed turns, and the requests that were given up."""

    session_id: str
    history: list[int]
    turns: list[tuple[str, list[int]]] = field(default_factory=list)  # request id, prompt and answer
    given_up: list[str] = field(default_factory=list)


@dataclass
class Trials:
    """One run: its turns as they are handed out, and what went wrong."""

    count: int
    seed: int
    next: int = 0
    twice: int = 0
    failures: dict[int, str] = field(default_factory=dict)  # by turn
    counts: dict[str, int] = field(default_factory=dict)

    def take(self) -> int | None:
        if self.next >= self.count:
            return None
        self.next += 1
        return self.next - 1

    def tally(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    """`count` turns. `variant`: see `WEAKNESSES`."""
    trials = Trials(count, seed)
    with WEAKNESSES[variant](), mock.patch.object(server.Model, "load", return_value=FakeModel(STEP_SECONDS)):
        asyncio.run(_run(trials, scratch))
    details = [f"seed {seed} turn {turn}: {why}" for turn, why in sorted(trials.failures.items())]
    if count >= 100 and not all(
        trials.counts.get(way) for way in ("joined", "resumed", "replayed", "started", "superseded")
    ):
        details.append(f"seed {seed}: turns were not met in every state: {trials.counts}")
    return Outcome(
        "dropped_retries", count, len(details), turns_twice=trials.twice, details=details, counts=trials.counts
    )


async def _run(trials: Trials, scratch: Path) -> None:
    settings = Settings(
        model=str(model_folder()), data_dir=scratch / "data", listen="127.0.0.1:0", threads=1,
        detached_turn_seconds=DETACHED_SECONDS, settle_seconds=0.05, drain_seconds=5.0,
    )  # fmt: skip
    daemon = server.Daemon(settings)
    await daemon.start()
    try:
        async with peer_of(daemon.port) as peer:
            await asyncio.gather(*(_talk(peer, daemon, trials) for _ in range(min(SESSIONS, trials.count))))
    finally:
        await daemon.stop()


async def _talk(peer: Peer, daemon: server.Daemon, trials: Trials) -> None:
    """Turns in sessions of its own until there are no more, and then a look at what the log has of them."""
    conversation: Conversation | None = None
    while (turn := trials.take()) is not None:
        if conversation is None or len(conversation.history) > CONTEXT_LIMIT:
            if conversation:
                _examine(daemon, conversation, trials, turn)
            root = [7, 8, 9 + turn % 200]
            session = await peer.create(token_ids=root)
            conversation = Conversation(session.session_id, root)
        rng = random.Random(f"{trials.seed}:{turn}")
        try:
            await _Trial(peer, conversation, trials, rng, f"turn-{turn}").run()
        except (AssertionError, SessiondClientError) as error:
            trials.failures[turn] = f"{type(error).__name__}: {error}"
            _examine(daemon, conversation, trials, turn)
            conversation = None  # what follows is judged by itself
    if conversation:
        _examine(daemon, conversation, trials, trials.count - 1)


class _Trial:
    """One turn, asked for as often as its stream is dropped and once more."""

    def __init__(
        self, peer: Peer, conversation: Conversation, trials: Trials, rng: random.Random, request_id: str
    ) -> None:
        self.peer, self.conversation, self.trials, self.rng, self.request_id = (
            peer,
            conversation,
            trials,
            rng,
            request_id,
        )
        self.prompt = [rng.randrange(3, 260) for _ in range(rng.randint(1, 12))]
        self.max_tokens = rng.randint(1, MAX_TOKENS)
        self.answer = answer_to([*conversation.history, *self.prompt], self.max_tokens)
        self.ids: list[int] = []
        self.text = b""

    async def run(self) -> None:
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            await self._dropped()
            if self.rng.random() < 0.5:
                await asyncio.sleep(self.rng.uniform(0, 3 * DETACHED_SECONDS))
            if self.rng.random() < 0.4 and await self._superseded():
                return
        stream = self._open(wait=self.rng.random() < 0.3)
        turn = await stream.read()
        if turn.error:
            raise turn.error
        self._take(stream)
        self.trials.tally(sessions_pb2.Attachment.Name(turn.accepted.attachment).removeprefix("ATTACHMENT_").lower())
        assert self.ids == self.answer, f"{self.ids} instead of {self.answer}"
        assert self.text.decode() == turn.answer == text_of(self.answer)
        assert turn.kinds.count("finished") == 1
        self.conversation.turns.append((self.request_id, [*self.prompt, *self.answer]))
        self.conversation.history += [*self.prompt, *self.answer]

    def _open(self, **options: Any) -> Stream:
        """Ask for the turn from what is there already, or now and then for all of it again."""
        if self.rng.random() < 0.3:
            self.ids, self.text = [], b""
        return self.peer.open(
            self.conversation.session_id, token_ids=self.prompt, request_id=self.request_id,
            max_tokens=self.max_tokens, resume_after_tokens=len(self.ids), **options,
        )  # fmt: skip

    async def _dropped(self) -> None:
        """Begin to read, and go away at a random message: before the first, after the last, anywhere."""
        stream = self._open()
        n_messages = self.rng.randint(0, self.max_tokens + 3)
        if n_messages == 0:
            await asyncio.sleep(self.rng.choice((0.0, 0.001, 0.003)))
        else:
            await stream.read(lambda turn: len(turn.events) >= n_messages)
        if stream.turn.error:
            raise stream.turn.error
        stream.cancel()
        self._take(stream)

    def _take(self, stream: Stream) -> None:
        """Join what came to what was there; each token says where it belongs."""
        for tokens in stream.turn.tokens:
            assert tokens.first_token_index == len(self.ids), "a token twice, or one too few"
            self.ids += tokens.token_ids
            self.text = self.text[: tokens.text_offset] + tokens.text.encode()

    async def _superseded(self) -> bool:
        """Another turn takes this one's place, if it stands suspended; asked for again it is told to have ended."""
        session = await self.peer.get(self.conversation.session_id)
        if session.suspended_request_id != self.request_id:
            return False
        other = _Trial(self.peer, self.conversation, self.trials, self.rng, f"{self.request_id}-instead")
        stream = other._open(supersede=True)
        turn = await stream.read()
        if turn.error:
            raise turn.error
        other._take(stream)
        assert other.ids == other.answer
        self.conversation.turns.append((other.request_id, [*other.prompt, *other.answer]))
        self.conversation.history += [*other.prompt, *other.answer]
        again = await self._open().read()
        assert again.finished.finish_reason == types_pb2.FINISH_REASON_ABORTED
        assert not again.finished.revision_id
        self.conversation.given_up.append(self.request_id)
        self.trials.tally("superseded")
        return True


def _examine(daemon: server.Daemon, conversation: Conversation, trials: Trials, turn: int) -> None:
    """Revisions, requests and tokens in the log are those of the turns, each once."""
    assert daemon.desk is not None
    log = daemon.desk.store.log
    revisions = log.revisions_of_session("default", conversation.session_id)[1:]
    trials.twice += len(revisions) - len({revision.request_id for revision in revisions})
    if turn in trials.failures:
        return  # the rest cannot be known
    problems = []
    if [r.request_id for r in revisions] != [request_id for request_id, _ in conversation.turns]:
        problems.append("the revisions are not the turns")
    rows: list[RequestRecord] = log.requests("default", conversation.session_id)
    states = {row.request_id: row.state for row in rows}
    expected = {request_id: "finished" for request_id, _ in conversation.turns}
    if states != expected | dict.fromkeys(conversation.given_up, "aborted"):
        problems.append(f"the requests are {states}")
    head = log.session("default", conversation.session_id).head_revision
    if read_branch(log, "default", head)[1].tolist() != conversation.history:
        problems.append("the log holds other tokens")
    if problems:
        trials.failures[turn] = "; ".join(problems)
