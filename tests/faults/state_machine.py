"""A hypothesis state machine: every sequence of calls, crashes included, leaves the store as a plain model of it.

Real desk, engine, sessions, conversations and store, cells of 8 tokens, on the fake model: no tolerance anywhere.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import tempfile
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import fake_model
from fake_daemon import FakeDaemon
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.reporting import with_reporter
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from outcome import Outcome
from plain_model import Asked, PlainSession, PlainStore
from state_care import CareRules
from state_steps import SOME, TENANT, NoSuchSessionError, Tally, where_possible
from weaknesses import WEAKNESSES

from sessiond import branching
from sessiond.admission import APPEND_ONLY, NEW_INPUT, TurnRequest
from sessiond.branch import read_branch
from sessiond.errors import SessionDeleted, SessiondError, SessionNotFound, TurnSuspended
from sessiond.sampling import SamplingParams
from sessiond.storage import keys
from sessiond.turnevents import Finished, Tokens
from sessiond.views import Fork, NewSession, Rollback

T = TypeVar("T")
STEPS = 30
DOCUMENT = tuple(range(30, 70))  # what sessions share: whole cells of the same tokens
IDS = st.lists(st.integers(3, fake_model.VOCAB - 1), min_size=1, max_size=20).map(tuple)


class Sequences(CareRules, RuleBasedStateMachine):
    """Every rule does one thing to the daemon and to the model, and compares.

    A rule for which there is no session does nothing. Preconditions would say so too, but must not rest on what only
    a run shows.
    """

    scratch: Path

    @initialize()
    def start(self) -> None:
        Tally.runs += 1
        self.folder = Path(tempfile.mkdtemp(dir=self.scratch))
        self.runner = asyncio.Runner()
        self.plain = PlainStore()
        self.daemon = self.run(self.opened())
        for cells in (0, 3):
            session_id = self.new_session((*DOCUMENT[: cells * 8], 90))
            self.whole(session_id, self.plain.ask(session_id, (91, 92), 4))

    def teardown(self) -> None:
        if not hasattr(self, "daemon"):
            return
        try:
            for session_id in self.plain.sessions:
                self.compare(session_id)
            self.nothing_dangles()
        finally:
            self.run(self.daemon.crash())
            self.runner.close()
            shutil.rmtree(self.folder)

    async def opened(self) -> FakeDaemon:
        return await FakeDaemon(self.folder / "data", detached_turn_seconds=0.0).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(_within(10.0, work))

    # --- sessions ------------------------------------------------------------------------------------------------

    @rule(cells=st.integers(0, 4), more=IDS)
    def create(self, cells: int, more: tuple[int, ...]) -> None:
        Tally.steps += 1
        self.new_session(DOCUMENT[: cells * 8] + more)

    def new_session(self, ids: tuple[int, ...]) -> str:
        self.plain.n_requests += 1
        new = NewSession(f"create-{self.plain.n_requests}", repr(ids), token_ids=ids)
        view = self.run(self.daemon.sessions.create(TENANT, new))
        again = self.run(self.daemon.sessions.create(TENANT, new))
        assert again.record.session_id == view.record.session_id
        self.plain.created(view.record.session_id, view.record.head_revision, list(ids))
        self.compare(view.record.session_id)
        return view.record.session_id

    @rule(which=SOME, purge=st.booleans())
    @where_possible
    def delete(self, which: int, purge: bool) -> None:
        session_id, session = self.session(which)
        if not any(not other.deleted and other is not session for other in self.plain.sessions.values()):
            raise NoSuchSessionError  # one stays, for the other rules
        self.run(self.daemon.sessions.delete(TENANT, session_id, "", purge_now=purge))
        session.deleted = True
        if purge:
            del self.plain.sessions[session_id]
            self.refused(SessionNotFound, self.daemon.sessions.get(TENANT, session_id))

    @rule(which=SOME)
    @where_possible
    def undelete(self, which: int) -> None:
        session_id, session = self.session(which, lambda s: s.deleted)
        self.run(self.daemon.sessions.undelete(TENANT, session_id, ""))
        session.deleted = False
        self.compare(session_id)

    @rule(which=SOME, revision=SOME)
    @where_possible
    def fork(self, which: int, revision: int) -> None:
        """Copies nothing: the blocks on disk and their references stay as they are."""
        session_id, _ = self.session(which, lambda s: not s.deleted)
        tree = self.plain.tree(session_id)
        at = tree[revision % len(tree)]
        self.plain.n_requests += 1
        asked = Fork(session_id, at, f"fork-{self.plain.n_requests}", at)
        view = self.run(branching.fork(self.daemon.sessions, TENANT, asked))
        again = self.run(branching.fork(self.daemon.sessions, TENANT, asked))
        assert again.record.session_id == view.record.session_id
        self.plain.forked(session_id, view.record.session_id, at)
        self.compare(view.record.session_id)

    @rule(which=SOME, revision=SOME)
    @where_possible
    def rollback(self, which: int, revision: int) -> None:
        session_id, _ = self.session(which, lambda s: not s.deleted)
        tree = self.plain.tree(session_id)
        at = tree[revision % len(tree)]
        self.plain.n_requests += 1
        asked = Rollback(session_id, at, f"back-{self.plain.n_requests}", at)
        self.run(branching.rollback(self.daemon.sessions, TENANT, asked))
        self.plain.rolled_back(session_id, at)
        self.compare(session_id)

    # --- turns ---------------------------------------------------------------------------------------------------

    @rule(which=SOME, new=IDS, max_tokens=st.integers(0, 12), supersede=st.booleans())
    @where_possible
    def turn(self, which: int, new: tuple[int, ...], max_tokens: int, supersede: bool) -> None:
        session_id, session = self.session(which)
        asked = self.plain.ask(session_id, new, max_tokens)
        if session.deleted:
            self.refused(SessionDeleted, self.say(session_id, asked))
            return
        if session.open and not supersede:
            self.refused(TurnSuspended, self.say(session_id, asked))
            return
        self.plain.gave_up(session_id)
        self.whole(session_id, asked, supersede=supersede)

    @rule(which=SOME, turn=SOME, seen=st.integers(0, 12))
    @where_possible
    def retry(self, which: int, turn: int, seen: int) -> None:
        """A finished turn is replayed, whatever came after it."""
        session_id, session = self.session(which, lambda s: bool(s.done))
        asked, revision = list(session.done.values())[turn % len(session.done)]
        ids, finished = self.run(self.say(session_id, asked, resume_after=seen))
        assert ids == asked.answer[seen:]
        assert finished is not None
        assert finished.revision == revision

    @rule(which=SOME, new=IDS, max_tokens=st.integers(1, 24), seen=st.integers(0, 10), crash=st.booleans())
    @where_possible
    def cut(self, which: int, new: tuple[int, ...], max_tokens: int, seen: int, crash: bool) -> None:
        """The client goes away in the middle, or the daemon does."""
        session_id, session = self.session(which, lambda s: not s.deleted and not s.open)
        asked = self.plain.ask(session_id, new, max_tokens)
        if crash:
            got = self.run(self.crash_after(session_id, asked, seen))
        else:
            self.daemon.model.hold(seen)
            got, _ = self.run(self.say(session_id, asked, leave_after=seen))
            self.run(self.daemon.left())
        assert got == asked.answer[: len(got)]
        row = self.daemon.store.log.request(TENANT, session_id, asked.request_id)
        if row is None:
            assert not got, "a streamed token's turn is not in the log"
        elif row.state == "finished":
            self.plain.committed(session_id, asked, row.revision_id)
        else:
            logged = self.daemon.store.log.tokens(TENANT, row.revision_id)[0].tolist()
            assert logged[len(new) :] == asked.answer[: len(logged) - len(new)]
            assert len(logged) >= len(new) + len(got), "acknowledged tokens are lost"
            session.open = asked
        self.compare(session_id)

    @rule(which=SOME, seen=st.integers(0, 10), crash=st.booleans())
    @where_possible
    def resume(self, which: int, seen: int, crash: bool) -> None:
        if not any(session.open and not session.deleted for session in self.plain.sessions.values()):
            self.cut(which=which, new=(7, 8, 9), max_tokens=24, seen=seen, crash=crash)
        session_id, session = self.session(which, lambda s: bool(s.open) and not s.deleted)
        assert session.open is not None
        self.whole(session_id, session.open, resume_after=seen)

    @rule(which=SOME, new=IDS, seen=st.integers(0, 10))
    @where_possible
    def supersede(self, which: int, new: tuple[int, ...], seen: int) -> None:
        if not any(session.open and not session.deleted for session in self.plain.sessions.values()):
            self.cut(which=which, new=(7, 8, 9), max_tokens=24, seen=seen, crash=False)
        session_id, _ = self.session(which, lambda s: bool(s.open) and not s.deleted)
        self.plain.gave_up(session_id)
        self.whole(session_id, self.plain.ask(session_id, new, 6), supersede=True)

    @rule(which=SOME)
    @where_possible
    def abort(self, which: int) -> None:
        session_id, session = self.session(which, lambda s: bool(s.open))
        assert session.open is not None
        self.run(self.daemon.conversations.abort(TENANT, session_id, session.open.request_id, commit=False))
        self.plain.gave_up(session_id)
        self.compare(session_id)

    # --- memory, disk and death ----------------------------------------------------------------------------------

    @rule(which=SOME)
    @where_possible
    def evict(self, which: int) -> None:
        session_id, _ = self.session(which, lambda s: not s.deleted)
        view, _, _ = self.run(self.daemon.sessions.suspend(TENANT, session_id))
        assert not view.hot

    @rule(which=SOME)
    @where_possible
    def warm(self, which: int) -> None:
        session_id, session = self.session(which, lambda s: not s.deleted)
        view, _ = self.run(self.daemon.sessions.warm(TENANT, session_id))
        cache = self.daemon.desk.live(TENANT, session_id).cache
        assert view.hot
        assert cache is not None
        if not session.open:
            expected = fake_model.Pure(self.plain.history[session.head][: cache.length])
            assert fake_model.total_of(cache, cache.length) == expected.total

    @rule()
    def idle(self) -> None:
        """Sealing and writing behind the turns come to their end."""
        Tally.steps += 1
        self.run(self._settled())

    @rule()
    def restart(self) -> None:
        Tally.steps += 1
        self.run(self.daemon.stop())
        self.daemon = self.run(self.opened())

    @rule()
    def crash(self) -> None:
        Tally.steps += 1
        self.run(self.daemon.crash())
        self.daemon = self.run(self.opened())
        for session_id in self.plain.sessions:
            self.compare(session_id)

    # --- how -----------------------------------------------------------------------------------------------------

    def session(self, which: int, wanted: Callable[[PlainSession], bool] = lambda s: True) -> tuple[str, PlainSession]:
        found = [(name, session) for name, session in self.plain.sessions.items() if wanted(session)]
        if not found:
            raise NoSuchSessionError
        return found[which % len(found)]

    def request(self, session_id: str, asked: Asked, **options: Any) -> TurnRequest:
        mode = NEW_INPUT if asked.max_tokens else APPEND_ONLY
        sampling = SamplingParams(max_tokens=max(1, asked.max_tokens))
        return TurnRequest(
            session_id, asked.request_id, asked.digest, mode=mode, token_ids=asked.new, sampling=sampling, **options
        )

    async def say(
        self, session_id: str, asked: Asked, leave_after: int | None = None, **options: Any
    ) -> tuple[list[int], Finished | None]:
        """The tokens that came, and how the turn ended; the client goes away after so many tokens."""
        ids: list[int] = []
        events = self.daemon.conversations.generate(TENANT, self.request(session_id, asked, **options))
        try:
            async for event in events:
                if isinstance(event, Tokens):
                    ids += [sampled.token_id for sampled in event.sampled]
                if isinstance(event, Finished):
                    return ids, event
                if leave_after is not None and len(ids) >= leave_after:
                    return ids, None
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        raise AssertionError("the stream ended without an end")

    def whole(self, session_id: str, asked: Asked, **options: Any) -> None:
        """Run the turn to its end; it says what it must."""
        ids, finished = self.run(self.say(session_id, asked, **options))
        assert ids == asked.answer[options.get("resume_after", 0) :]
        assert finished is not None
        self.plain.committed(session_id, asked, finished.revision)
        self.compare(session_id)

    async def crash_after(self, session_id: str, asked: Asked, seen: int) -> list[int]:
        """The daemon dies when the client has so many tokens, or when the turn is over."""
        ids: list[int] = []
        self.daemon.model.hold(seen)
        events = self.daemon.conversations.generate(TENANT, self.request(session_id, asked))
        async for event in events:
            if isinstance(event, Tokens):
                ids += [sampled.token_id for sampled in event.sampled]
            if isinstance(event, Finished) or len(ids) >= seen:
                break
        await self.daemon.crash()
        await events.aclose()  # type: ignore[attr-defined]
        self.daemon = await self.opened()
        return ids

    def refused(self, kind: type[SessiondError], work: Coroutine[Any, Any, Any]) -> None:
        try:
            self.run(work)
        except kind:
            return
        raise AssertionError(f"{kind.reason} was not raised")

    def compare(self, session_id: str) -> None:
        """Record, revisions, tokens and requests of a session are those of the model."""
        log, session = self.daemon.store.log, self.plain.sessions[session_id]
        record = log.session(TENANT, session_id)
        assert record.head_revision == session.head
        assert (record.deleted_us is not None) == session.deleted
        assert record.extra.get("open_request") == (session.open.request_id if session.open else None)
        own = log.revisions_of_session(TENANT, session_id)
        assert {(r.revision_id, r.parent) for r in own} == {(name, self.plain.parent[name]) for name in session.own}
        for name in self.plain.tree(session_id):
            assert read_branch(log, TENANT, name)[1].tolist() == self.plain.history[name]
        rows = [row for row in log.requests(TENANT, session_id) if row.params.get("mode") != "rollback"]
        assert len(rows) + session.rollbacks == len(log.requests(TENANT, session_id))
        states = {row.request_id: row.state for row in rows}
        expected = dict.fromkeys(session.done, "finished") | dict.fromkeys(session.given_up, "aborted")
        if session.open:
            states[session.open.request_id] = expected[session.open.request_id] = "open"
        assert states == expected

    def nothing_dangles(self) -> None:
        """Every reference in the log finds its KV; no tokens lie under a revision that nothing knows."""
        plain = self.plain
        self.run(self.daemon.stop())
        self.daemon = self.run(self.opened())
        self.verify_twice()
        log = self.daemon.store.log
        owners = {(owner.kind, owner.id, owner.generation) for owner in self.daemon.store.blocks.owners(TENANT)}
        for ref in log.all_cell_refs(TENANT):
            assert ("cell", ref.prefix_hash, 0) in owners
        open_revisions = set()
        for session_id, session in plain.sessions.items():
            if session.open:
                row = log.request(TENANT, session_id, session.open.request_id)
                assert row is not None
                open_revisions.add(row.revision_id)
            for name in session.own:
                tail = log.tail_ref(TENANT, name)
                assert tail is None or ("tail", name.encode(), tail.generation) in owners
        with log._env.read() as txn:
            kinds = [keys.split(bytes(key)) for key, _ in txn.cursor()]
        known = open_revisions.union(*(plain.tree(session_id) for session_id in plain.sessions))
        under = {keys.split_strings(rest[:-8])[0] for _, kind, rest in kinds if kind == keys.TOKENS}
        assert under <= known, "tokens of no turn"


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. What takes longer hangs: raises AssertionError that says what every task waits for."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait([task], timeout=seconds)
    if done:
        return task.result()
    told = io.StringIO()
    for one in asyncio.all_tasks():
        one.print_stack(file=told)
    task.cancel()
    await asyncio.wait([task])
    raise AssertionError(f"no end after {seconds} s\n{told.getvalue()}")


def _quiet(_line: object) -> None:
    """What hypothesis tells of a failure comes with the exception as well."""


def run(count: int, first_seed: int, scratch: Path, variant: str = "") -> Outcome:
    """`count` sequences of 30 steps (hypothesis adds a few). `variant`: see `WEAKNESSES`."""
    Tally.steps = Tally.runs = 0
    details: list[str] = []
    Sequences.scratch = scratch
    phases = (Phase.generate,) if variant else (Phase.generate, Phase.shrink)
    options = settings(
        max_examples=count, stateful_step_count=STEPS, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=phases,
    )  # fmt: skip
    with WEAKNESSES[variant](), with_reporter(_quiet):
        try:
            run_state_machine_as_test(seed(first_seed)(Sequences), settings=options)
        except Exception as error:  # noqa: BLE001 - whatever a sequence of calls raised is what was looked for
            shown = "".join(traceback.format_exception(error))[-6000:]
            details = [f"seed {first_seed}: {shown}"]
    if not details and not variant and Tally.runs < count:
        details = [f"seed {first_seed}: only {Tally.runs} of {count} sequences were run"]
    return Outcome(
        "state_machine", run=min(count, Tally.runs), failed=len(details), details=details, counts={"steps": Tally.steps}
    )
