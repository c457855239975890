"""Turns of all sessions: start, join, resume, replay and abort them by request_id, one at a time a session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import structlog

from sessiond import admission
from sessiond.admission import TurnRequest
from sessiond.branch import read_branch
from sessiond.desk import Desk
from sessiond.errors import (
    BadRequest,
    RequestIdReused,
    SessiondError,
    SessionNotFound,
)
from sessiond.live import Live
from sessiond.sampling import SamplingParams
from sessiond.sessions import Sessions, refuse_busy
from sessiond.stepevents import replay
from sessiond.storage.records import RequestRecord, SessionRecord
from sessiond.turn import Turn
from sessiond.turnevents import Accepted, Finished, Tokens, TurnEvent
from sessiond.turnlog import discard_turn
from sessiond.turnplaces import Place

log = structlog.get_logger()


class Conversations:
    """What Generate and AbortTurn do. Runs on the event loop."""

    def __init__(self, desk: Desk, sessions: Sessions) -> None:
        self.desk = desk
        self.sessions = sessions
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(self, tenant: str, request: TurnRequest) -> AsyncIterator[TurnEvent]:
        """Run, join, resume or replay the turn of `request.request_id`; see docs/api.md."""
        admission.check(self.desk, request)
        record = self.sessions.record(tenant, request.session_id, deleted_too=True)
        live = self.desk.live(tenant, request.session_id)
        found = await self._turn_of(live, record, request)
        if isinstance(found, RequestRecord):
            async for event in self._replay(found, request.resume_after):
                yield event
            return
        turn, attachment = found
        async for event in turn.stream.events(request.resume_after, attachment):
            yield event

    async def _turn_of(
        self, live: Live, record: SessionRecord, request: TurnRequest
    ) -> tuple[Turn, str] | RequestRecord:
        """The turn to listen to, and how it was come by; or what the log has of one that has ended.

        A turn that waits for another holds a place of its own. Raises QueueFull where there is none.
        """
        place: Place | None = None
        try:
            while True:
                row = self.desk.store.log.request(live.tenant, request.session_id, request.request_id)
                if row and row.digest != request.digest:
                    raise RequestIdReused(
                        f"request_id {request.request_id} belongs to a different request",
                        request_id=request.request_id,
                    )
                if live.turn and live.turn.plan.request.request_id == request.request_id:
                    if not live.turn.suspending:
                        return live.turn, "joined"
                    await live.turn.done()
                    continue
                if row and row.state in ("finished", "aborted", "failed"):
                    return row
                self._refuse(live, record, request, row)
                place = place or self.desk.places.take(request.priority)
                if live.turn:
                    await live.turn.done()
                    continue
                if live.lease.locked():  # warming, suspending, or a turn about to start: look again in a moment
                    await asyncio.sleep(0.001)
                    continue
                starting = asyncio.create_task(self._begin(live, request, row, place))
                place = None
                try:
                    begun = await asyncio.shield(starting)
                except asyncio.CancelledError:
                    starting.add_done_callback(_left)
                    raise
                if begun is not None:
                    return begun, begun.plan.attachment
        finally:
            if place is not None:
                self.desk.places.give_back(place, ran=False)

    def _refuse(self, live: Live, record: SessionRecord, request: TurnRequest, row: RequestRecord | None) -> None:
        """Refuse a turn that cannot begin now, nor wait for another."""
        self.sessions.refuse_draining()
        self.sessions.refuse_foreign(record)
        if row is None:
            self.desk.store.require_space()
        if not request.wait:
            refuse_busy(live)

    async def _begin(self, live: Live, request: TurnRequest, row: RequestRecord | None, place: Place) -> Turn | None:
        """Take the lease and launch the turn, which then owns it, and its place.

        None: the same request began or ended meanwhile.
        """
        turn = None
        try:
            await live.lease.acquire()
            try:
                if self.desk.store.log.request(live.tenant, request.session_id, request.request_id) == row:
                    turn = await self._start(live, request, row, place)
            except BaseException:
                if live.cache:
                    self.desk.settle(live)  # what was going on behind the last turn goes on
                raise
            finally:
                if turn is None:
                    live.lease.release()
        finally:
            if turn is None:
                self.desk.places.give_back(place, ran=False)
        return turn

    async def _start(self, live: Live, request: TurnRequest, row: RequestRecord | None, place: Place) -> Turn:
        await self.desk.unsettle(live)
        tenant, record = live.tenant, self.sessions.record(live.tenant, request.session_id)
        open_id = record.extra.get("open_request")
        if open_id and open_id != request.request_id:
            other = self.desk.store.log.request(tenant, request.session_id, open_id)
            if other and not request.supersede:
                raise self.desk.suspended_error(other)
            if other:
                record = await discard_turn(self.desk, live, other)
        live.load_history(self.desk.store.log, record.head_revision)
        if row:
            plan = admission.resume_turn(self.desk, record, row, request.priority)
        else:
            plan = admission.plan_turn(self.desk, live, record, request)
        turn = Turn(self.desk, live, plan)
        live.turn = turn
        task = asyncio.create_task(self._run(live, turn, place))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return turn

    async def _run(self, live: Live, turn: Turn, place: Place) -> None:
        try:
            await turn.run()
        finally:
            live.turn = None
            self.desk.places.give_back(place, ran=True)
            live.give_room_back()
            live.last_used = time.monotonic()
            self.desk.settle(live)
            live.lease.release()

    async def _replay(self, row: RequestRecord, resume_after: int) -> AsyncIterator[TurnEvent]:
        """The events of a turn that has ended, from the log. Logprobs are not kept."""
        done = row.finished or {}
        if "error" in done:
            raise _error_of(done["error"])
        finished = Finished.from_json(done)
        usage = finished.usage
        yield Accepted(
            base_revision=row.base_revision,
            turn_revision=row.revision_id,
            new=usage.get("new", 0),
            reused=usage.get("reused", 0),
            drift=bool(row.params["drift"]),
            attachment="replayed",
            log_start=self.desk.store.log.revision(row.tenant, row.base_revision).log_end,
        )
        if finished.revision:
            for tokens in self._committed(row, finished):
                if tokens.first_index >= resume_after:
                    yield tokens
        yield finished

    def _committed(self, row: RequestRecord, finished: Finished) -> list[Tokens]:
        """A committed turn's generated tokens, each with the text it completes."""
        log, n_prompt = self.desk.store.log, int(row.params["n_prompt"])
        ids, _ = log.tokens(row.tenant, row.revision_id)
        stream = self.desk.new_stream((), None if n_prompt else read_branch(log, row.tenant, row.base_revision)[1])
        # After a stop string the last token is a piece of text, whatever its id.
        sampling = SamplingParams.from_json(row.params["sampling"])
        stop_ids = frozenset() if finished.stop else self.desk.stop_ids_of(sampling)
        out = replay(row.revision_id, ids[n_prompt:].tolist(), stream, stop_ids)
        if out:
            out[-1] = replace(out[-1], text=out[-1].text + stream.flush().text)
        return [Tokens.of(token) for token in out]

    async def abort(self, tenant: str, session_id: str, request_id: str, *, commit: bool) -> tuple[bool, str, int]:
        """Stop a running or suspended turn. Idempotent: (stopped now, revision if committed, generated tokens)."""
        self.sessions.record(tenant, session_id, deleted_too=True)
        if not request_id:
            raise BadRequest("request_id is required: it names the turn to stop", field="request_id")
        live = self.desk.live(tenant, session_id)
        turn = live.turn
        if turn and request_id == turn.plan.request.request_id:
            turn.stop("commit" if commit else "discard")
            await turn.done()
            if turn.stream.failure:
                raise turn.stream.failure
            return True, turn.stream.finished.revision if turn.stream.finished else "", len(turn.generated)
        return await self._abort_suspended(live, request_id, commit=commit)

    async def _abort_suspended(self, live: Live, request_id: str, *, commit: bool) -> tuple[bool, str, int]:
        log = self.desk.store.log
        async with live.lease:  # with it the request is what it is read as: no turn of it runs
            row = log.request(live.tenant, live.session_id, request_id)
            if row is None:
                raise SessionNotFound(f"no turn {request_id} in session {live.session_id}", request_id=request_id)
            if row.state not in ("running", "suspended"):
                finished = row.finished or {}
                return False, str(finished.get("revision", "")), int(finished.get("usage", {}).get("generated", 0))
            await self.desk.unsettle(live)
            try:
                record = self.sessions.record(live.tenant, live.session_id, deleted_too=True)
                live.load_history(log, record.head_revision)
                ids, _ = log.tokens(live.tenant, row.revision_id)
                count = len(ids) - int(row.params["n_prompt"])
                if commit:
                    turn = Turn(self.desk, live, admission.resume_turn(self.desk, record, row))
                    await turn.commit_aborted()
                    return True, turn.turn_id, count
                await discard_turn(self.desk, live, row)
                return True, "", count
            finally:
                if live.cache:
                    self.desk.settle(live)


def _left(starting: asyncio.Task[Turn | None]) -> None:
    """The client went away while its turn began: nobody listens."""
    if not starting.cancelled() and starting.exception() is None and (turn := starting.result()):
        turn.stream.leave()


def _error_of(told: dict[str, str]) -> SessiondError:
    """The error that a failed turn ended with, for its replay."""
    kinds = {SessiondError.reason: SessiondError}
    stack = [SessiondError]
    while stack:
        for kind in stack.pop().__subclasses__():
            kinds[kind.reason] = kind
            stack.append(kind)
    return kinds.get(told["reason"], SessiondError)(told["message"])
