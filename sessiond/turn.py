"""One turn from request to commit.

The prompt is durable before the engine starts; a token is durable before it is streamed; the revision, the session's
new head and the finished request are one transaction before `Finished`. A process that dies in between leaves a
running request, which goes on from its last logged token when the client comes back with its request_id.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import structlog

from sessiond.desk import Desk
from sessiond.errors import ResourceExhausted, SessiondError, StoreReadOnly, Unavailable
from sessiond.live import Live, computed_upto, touched
from sessiond.messages import encode_messages
from sessiond.sampling import Sampled, Sampler, SamplingParams
from sessiond.scheduler import Ended, Event, TokenOut, TurnWork
from sessiond.storage.batch import LogBatch
from sessiond.storage.records import RequestRecord, RequestState, RevisionRecord, SessionRecord
from sessiond.template import Message
from sessiond.tiers import Recompute, Restoration
from sessiond.types import FinishReason

log = structlog.get_logger()

# Room reserved for an answer; a longer one grows into what is free.
EXPECTED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Accepted:
    """The turn is in the log. `new` prompt positions are computed by it, `reused` are not."""

    base_revision: str
    turn_revision: str
    new: int
    reused: int
    drift: bool
    attachment: str
    log_start: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Durable tokens `first_index`.. and the text they complete, at `text_offset` bytes of the answer."""

    first_index: int
    text_offset: int
    sampled: tuple[Sampled, ...]
    text: str

    @classmethod
    def of(cls, out: TokenOut) -> Tokens:
        return cls(out.index, out.text_offset, (out.sampled,), out.text)


@dataclass(frozen=True, slots=True)
class Finished:
    """The turn is a revision (or, aborted without commit, is not: `revision` is then empty)."""

    revision: str
    reason: FinishReason | None  # None: nothing was generated
    stop: str
    committed: int
    usage: dict[str, int]
    ttft_ms: float
    tokens_per_second: float
    answer: str
    memory: dict[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "reason": str(self.reason) if self.reason else None,
            "stop": self.stop,
            "committed": self.committed,
            "usage": self.usage,
            "ttft_ms": self.ttft_ms,
            "tokens_per_second": self.tokens_per_second,
            "answer": self.answer,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Finished:
        return cls(**{**value, "reason": FinishReason(value["reason"]) if value["reason"] else None})


TurnEvent = Accepted | Restoration | Tokens | Finished


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """What a turn will do, settled before anything is written."""

    record: SessionRecord
    request: RequestRecord
    prompt: list[int]
    flags: list[int]
    messages: tuple[Message, ...]
    sampling: SamplingParams
    kind: str = "turn"
    drift: bool = False
    logged: tuple[int, ...] = ()
    attachment: str = "started"
    abort_on_disconnect: bool = False


class Turn:
    """A running turn. Any number of clients may listen; it runs on without any, for a while."""

    def __init__(self, desk: Desk, live: Live, plan: TurnPlan) -> None:
        self.desk = desk
        self.live = live
        self.plan = plan
        self.turn_id = plan.request.revision_id
        self.began = time.perf_counter()
        self.accepted: Accepted | None = None
        self.restored: Restoration | None = None
        self.finished: Finished | None = None
        self.failure: SessiondError | None = None
        self.generated: list[int] = list(plan.logged)
        self._published: list[Tokens] = []
        self._first_token_at = 0.0
        self._ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._listeners: set[asyncio.Event] = set()
        self._detach_timer: asyncio.TimerHandle | None = None
        self._outcome = "commit"
        self._opened = plan.attachment != "started"
        self._submitted = self._stopping = False
        self._told: SessiondError | None = None
        self._stop_ids = desk.stop_ids_of(plan.sampling)
        goes_on = plan.kind == "turn" and not plan.prompt
        self._stream = desk.new_stream(plan.sampling.stop, live.ids if goes_on else None)

    # --- what clients do -----------------------------------------------------------------------------------------

    async def events(self, resume_after: int, attachment: str) -> AsyncIterator[TurnEvent]:
        """The turn's events for one client, tokens from index `resume_after` on. Raises what the turn failed with."""
        wake = asyncio.Event()
        self._listeners.add(wake)
        if self._detach_timer:
            self._detach_timer.cancel()
            self._detach_timer = None
        try:
            sent_accepted = sent_restored = False
            position = 0
            while True:
                wake.clear()
                if self.accepted and not sent_accepted:
                    sent_accepted = True
                    yield replace(self.accepted, attachment=attachment)
                if self.restored and sent_accepted and not sent_restored:
                    sent_restored = True
                    yield self.restored
                while position < len(self._published):
                    tokens = self._published[position]
                    position += 1
                    if tokens.first_index >= resume_after:
                        yield tokens
                if self.failure:
                    raise self.failure
                if self.finished:
                    yield self.finished
                    return
                if position == len(self._published):
                    await wake.wait()
        finally:
            self._listeners.discard(wake)
            if not self._listeners and not self.over:
                self._detached()

    @property
    def over(self) -> bool:
        return self.finished is not None or self.failure is not None or self._ended.done()

    def stop(self, outcome: str, told: SessiondError | None = None) -> None:
        """End the turn at the next step. `outcome`: commit (as aborted), discard, or suspend (listeners are `told`)."""
        if not self.over:
            self._outcome, self._told, self._stopping = outcome, told, True
            if self._submitted:
                self.desk.engine.cancel(self.turn_id)

    async def done(self) -> None:
        """Wait until the turn has committed, failed or been suspended, and released the lease."""
        async with self.live.lease:
            pass

    def _detached(self) -> None:
        if self.plan.abort_on_disconnect:
            self.stop("discard")
            return
        loop = asyncio.get_running_loop()
        self._detach_timer = loop.call_later(self.desk.settings.detached_turn_seconds, self.stop, "suspend")

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.set()

    # --- what the turn does --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run to the end. The caller holds the lease and releases it afterwards."""
        self.desk.turns[self.turn_id] = self
        try:
            await self._start()
            ended = await self._ended
            if ended.error is not None:
                raise ended.error
            await self._finish(ended)
        except SessiondError as error:
            await self._fail(error)
        except Exception as error:
            log.exception("turn failed", turn=self.turn_id)
            await self._fail(SessiondError(f"the turn failed: {error}"))
        finally:
            self.desk.turns.pop(self.turn_id, None)
            if self._detach_timer:
                self._detach_timer.cancel()
            self._wake()

    async def commit_aborted(self) -> None:
        """Make a suspended turn a revision as it stands, without the engine. The caller holds the lease."""
        self._accept(new=0, reused=len(self.live.ids) + len(self.plan.prompt))
        await self._finish(Ended(self.turn_id, FinishReason.ABORTED))

    async def _start(self) -> None:
        plan, live = self.plan, self.live
        if plan.kind != "append":  # may refuse the turn, which then has used up no request_id
            expected = min(plan.sampling.max_tokens or EXPECTED_TOKENS, EXPECTED_TOKENS)
            await self.desk.make_room(live, len(live.ids) + len(plan.prompt) + expected)
        opening = asyncio.create_task(self._open()) if plan.attachment == "started" else None
        try:
            if live.cache is None and plan.kind != "append":
                self.restored = await self.desk.warm(live)
        finally:
            if opening is not None:
                await opening
        if plan.kind == "append":
            self._accept(new=len(plan.prompt), reused=len(live.ids))
            self._ended.set_result(Ended(self.turn_id, FinishReason.STOP))
            return
        assert live.cache is not None
        tokens = [*live.ids.tolist(), *plan.prompt]
        sampler = Sampler(plan.sampling, self.desk.vocab_size, tokens)
        known = max(computed_upto(live.chain), live.cache.length)
        work = TurnWork(
            self.turn_id,
            live.cache,
            tokens,
            plan.logged,
            cell_tokens=self.desk.store.cell_tokens,
            seal=plan.record.seal,
            known=min(known, len(live.ids)),
            max_new=plan.sampling.max_tokens or self.desk.max_context,
            max_context=self.desk.max_context,
            stop_ids=self._stop_ids,
            sampler=sampler,
            stream=self._stream,
        )
        for token in work.replayed:
            self._published.append(Tokens.of(token))
        computed = sum(piece.end - piece.start for piece in work.pieces)
        if self.restored is not None:
            self._explain_restoration(self.restored, work)
            if not (self.restored.tokens_restored or self.restored.recomputed):
                self.restored = None  # there was nothing to restore
        self.desk.reused_tokens += len(tokens) - computed
        self._accept(new=computed, reused=len(tokens) - computed)
        if work.ended_before:
            self._ended.set_result(work.ended_before)
        elif self._stopping:
            self._ended.set_result(Ended(self.turn_id, FinishReason.ABORTED))
        else:
            self._submitted = True
            self.desk.engine.submit(work)

    def _accept(self, new: int, reused: int) -> None:
        self.accepted = Accepted(
            base_revision=self.plan.request.base_revision,
            turn_revision=self.turn_id,
            new=new,
            reused=reused,
            drift=self.plan.drift,
            attachment=self.plan.attachment,
            log_start=len(self.live.ids),
        )
        self._wake()

    async def _open(self) -> None:
        """Request and prompt become durable, and the session's pointer to them, in one transaction."""

        def build(record: SessionRecord) -> LogBatch:
            plan, batch = self.plan, LogBatch()
            batch.put_request(plan.request)
            if plan.prompt:
                ids, flags = np.array(plan.prompt, np.uint32), np.array(plan.flags, np.uint8)
                batch.append_tokens(record.tenant, self.turn_id, 0, ids, flags)
            extra = {**record.extra, "open_request": plan.request.request_id}
            batch.put_session(replace(record, extra=extra))
            return batch

        await self.desk.edit(self.live, build)
        self._opened = True

    def _explain_restoration(self, restored: Restoration, work: TurnWork) -> None:
        missing = max(0, work.known - restored.tokens_restored)
        if missing:
            cause = "corrupt" if restored.corrupt else "not_persisted"
            restored.recomputed.append(Recompute(cause, missing, restored.corrupt))

    def deliver(self, event: Event) -> None:
        """An event of the engine, on the event loop."""
        if isinstance(event, TokenOut):
            self._log_token(event)
        elif isinstance(event, Ended) and not self._ended.done():
            self._ended.set_result(event)

    def _log_token(self, event: TokenOut) -> None:
        self.generated.append(event.sampled.token_id)
        tokens = Tokens.of(event)
        batch = LogBatch()
        start = len(self.plan.prompt) + event.index
        batch.append_tokens(self.plan.record.tenant, self.turn_id, start, np.array([event.sampled.token_id], np.uint32))
        try:
            durable = self.desk.store.log.write(batch)
        except SessiondError as error:
            self._break_off(error)
            return
        if self.desk.settings.stream_before_log:
            self._publish(tokens)
        else:
            loop = asyncio.get_running_loop()
            durable.add_done_callback(lambda future: loop.call_soon_threadsafe(self._durable, future, tokens))

    def _durable(self, future: Future[None], tokens: Tokens) -> None:
        error = future.exception()
        if error is None:
            self._publish(tokens)
        else:
            self._break_off(error if isinstance(error, SessiondError) else SessiondError(str(error)))

    def _break_off(self, error: SessiondError) -> None:
        """The log takes no more tokens: stop computing them."""
        self.desk.engine.cancel(self.turn_id)
        if not self._ended.done():
            self._ended.set_result(Ended(self.turn_id, FinishReason.ABORTED, error=error))

    def _publish(self, tokens: Tokens) -> None:
        if not self._first_token_at:
            self._first_token_at = time.perf_counter()
        self._published.append(tokens)
        self._wake()

    # --- how it ends ---------------------------------------------------------------------------------------------

    async def _finish(self, ended: Ended) -> None:
        if ended.reason is FinishReason.ABORTED and self._outcome != "commit":
            await (self._suspend() if self._outcome == "suspend" else self._discard())
            return
        committed, answer, hit = self._cut(ended)
        plan, live = self.plan, self.live
        assert self.accepted is not None
        history = len(live.ids)
        kept = history + len(plan.prompt) + len(committed)
        computed = computed_upto(live.chain)
        if live.cache:
            live.cache.truncate(min(live.cache.length, kept), self.desk.store.cell_tokens)
            computed = live.cache.length
        now = self.desk.now_us()
        usage = {"new": self.accepted.new, "reused": self.accepted.reused, "generated": len(committed)}
        revision = RevisionRecord(
            tenant=plan.record.tenant,
            revision_id=self.turn_id,
            session_id=plan.record.session_id,
            parent=plan.request.base_revision,
            kind="append" if plan.kind == "append" else "turn",
            log_start=history,
            log_end=kept,
            position_start=history,
            position_end=kept,
            n_prompt=len(plan.prompt),
            n_generated=len(committed),
            finish_reason=None if plan.kind == "append" else str(ended.reason),
            aborted=ended.reason is FinishReason.ABORTED,
            created_us=now,
            request_id=plan.request.request_id,
            usage=usage,
            extra={"computed": computed, "ended": self._ended_how(committed)},
        )
        finished = self._summary(ended, hit, kept, usage, answer)
        ids = [*plan.prompt, *committed]

        def build(record: SessionRecord) -> LogBatch:
            batch = LogBatch()
            batch.delete_revision(record.tenant, self.turn_id)
            if ids:
                flags = plan.flags + [0] * len(committed)
                batch.append_tokens(record.tenant, self.turn_id, 0, np.array(ids, np.uint32), np.array(flags, np.uint8))
            said = () if plan.kind == "append" else (Message("assistant", answer),)
            batch.put_revision(revision, encode_messages(plan.messages, said))
            batch.put_session(
                replace(
                    touched(closed(record), now),
                    head_revision=self.turn_id,
                    updated_us=now,
                    generation=record.generation + 1,
                )
            )
            state: RequestState = "aborted" if revision.aborted else "finished"
            batch.put_request(replace(plan.request, state=state, updated_us=now, finished=finished.to_json()))
            return batch

        await self.desk.edit(live, build)
        live.head, live.chain = self.turn_id, [*live.chain, revision]
        live.ids = np.concatenate([live.ids, np.array(ids, np.uint32)])
        self.finished = finished

    def _cut(self, ended: Ended) -> tuple[list[int], str, str]:
        """Tokens that stay in the log, the answer's text, and the stop string that ended it.

        After a stop string the model remembers what the user saw: tokens wholly before it, and the visible part of a
        token that it splits, encoded again.
        """
        if ended.stop_hit is None:
            shown = self.generated[:-1] if self.generated and self.generated[-1] in self._stop_ids else self.generated
            return self.generated, self.desk.decode(shown), ""
        hit = ended.stop_hit
        whole = self.generated[: hit.n_whole_tokens]
        history = len(self.live.ids) + len(self.plan.prompt)
        if self.live.cache:
            self.live.cache.truncate(history + len(whole), self.desk.store.cell_tokens)
        committed = whole + (self.desk.encode(hit.visible_rest) if hit.visible_rest else [])
        return committed, self.desk.decode(whole) + hit.visible_rest, hit.stop

    def _ended_how(self, committed: list[int]) -> str | None:
        """Whether the answer's end-of-turn tokens are logged; None where there is no answer to close."""
        if self.plan.kind == "append":
            return None
        return "stop_token" if committed and committed[-1] in self.desk.stop_ids else "open"

    def _summary(self, ended: Ended, stop: str, committed: int, usage: dict[str, int], answer: str) -> Finished:
        now = time.perf_counter()
        decoding = now - self._first_token_at if self._first_token_at else 0.0
        count = len(self.generated) - len(self.plan.logged)
        cache = self.live.cache
        return Finished(
            revision=self.turn_id,
            reason=None if self.plan.kind == "append" else ended.reason,
            stop=stop,
            committed=committed,
            usage=usage,
            ttft_ms=(self._first_token_at - self.began) * 1e3 if self._first_token_at else 0.0,
            tokens_per_second=(count - 1) / decoding if count > 1 and decoding > 0 else 0.0,
            answer=answer,
            memory={"device": cache.nbytes if cache else 0},
        )

    async def _suspend(self) -> None:
        """Leave the request open: its tokens are in the log, its KV stays hot until the session idles."""
        request = replace(self.plan.request, state="suspended", updated_us=self.desk.now_us())
        batch = LogBatch()
        batch.put_request(request)
        await asyncio.wrap_future(self.desk.store.log.write(batch))
        self.failure = self._told or self.desk.suspended_error(request)

    async def _discard(self) -> None:
        """Nothing of the turn stays in the log; the KV of its base does."""
        await self.desk.edit(self.live, lambda record: discarded(record, self.plan.request, self.desk.now_us()))
        if self.live.cache:
            self.live.cache.truncate(len(self.live.ids), self.desk.store.cell_tokens)
        self.finished = NOTHING

    async def _fail(self, error: SessiondError) -> None:
        """Tell the client and the log. The session keeps its head.

        Where the store failed, the request stays open: what was acknowledged is in the log, and the turn can go on.
        """
        if self.live.cache:
            self.live.cache.truncate(len(self.live.ids), self.desk.store.cell_tokens)
        if self._opened and not isinstance(error, (ResourceExhausted, StoreReadOnly, Unavailable)):
            told = {"reason": error.reason, "message": error.message}
            try:
                now = self.desk.now_us()
                await self.desk.edit(self.live, lambda record: discarded(record, self.plan.request, now, told))
            except SessiondError as second:
                log.error("failed turn could not be closed in the log", turn=self.turn_id, error=second.message)
        self.failure = error


NOTHING = Finished("", FinishReason.ABORTED, "", 0, {}, 0.0, 0.0, "")


def closed(record: SessionRecord) -> SessionRecord:
    """The record without its pointer to an open request."""
    return replace(record, extra={k: v for k, v in record.extra.items() if k != "open_request"})


def discarded(
    record: SessionRecord, request: RequestRecord, now_us: int, failed: dict[str, str] | None = None
) -> LogBatch:
    """Close a turn's request without a revision: drop its tokens and the session's pointer to it."""
    batch = LogBatch()
    batch.delete_revision(record.tenant, request.revision_id)
    batch.put_session(closed(record))
    state: RequestState = "failed" if failed else "aborted"
    finished = {"error": failed} if failed else NOTHING.to_json()
    batch.put_request(replace(request, state=state, updated_us=now_us, finished=finished))
    return batch
