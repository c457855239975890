"""One turn from request to commit.

The prompt is durable before the engine starts; a token is durable before it is streamed; the revision, the session's
new head and the finished request are one transaction before `Finished`. A process that dies in between leaves a
running request, which goes on from its last logged token when the client comes back with its request_id.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from functools import partial

import numpy as np
import structlog

from sessiond.branch import computed_upto
from sessiond.cache import SessionCache
from sessiond.desk import Desk
from sessiond.errors import ResourceExhausted, SessiondError, StoreReadOnly, Unavailable
from sessiond.explaining import Clock, explanation
from sessiond.live import Live
from sessiond.reading import Reading, exact_tier
from sessiond.readsummary import attention_mass
from sessiond.restoring import Recompute, Restoration
from sessiond.sampling import Sampler
from sessiond.stepevents import Ended, TokenOut
from sessiond.storage.batch import LogBatch
from sessiond.turnevents import NOTHING, Accepted, Finished, Tokens
from sessiond.turnlog import commit_turn, discard_turn, open_turn, suspend_turn
from sessiond.turnplan import TurnPlan
from sessiond.turnstream import TurnStream
from sessiond.turnwork import TurnWork
from sessiond.types import FinishReason

log = structlog.get_logger()

# Room reserved for an answer; a longer one grows into what is free.
EXPECTED_TOKENS = 256


class Turn:
    """A running turn. Any number of clients may listen; it runs on without any, for a while."""

    def __init__(self, desk: Desk, live: Live, plan: TurnPlan) -> None:
        self.desk = desk
        self.live = live
        self.plan = plan
        self.turn_id = plan.request.revision_id
        self.clock = Clock(time.perf_counter(), desk.now_us())
        self.reading: Reading | None = None
        self.stream = TurnStream(self._attached, self._detached)
        self.generated: list[int] = list(plan.logged)
        self._first_token_at = 0.0
        self._ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._detach_timer: asyncio.TimerHandle | None = None
        self._outcome = "commit"
        self._opened = plan.attachment != "started"
        self._submitted = self._stopping = False
        self._told: SessiondError | None = None
        self._broken: SessiondError | None = None
        self._last_write: Future[None] | None = None
        self._stop_ids = desk.stop_ids_of(plan.sampling)
        goes_on = plan.kind == "turn" and not plan.prompt
        self._text = desk.new_stream(plan.sampling.stop, live.ids if goes_on else None)

    # --- what clients do -----------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        return self.stream.over or self._ended.done()

    @property
    def suspending(self) -> bool:
        """Told to suspend, and not yet suspended: who comes for it now takes it up when it is."""
        return self._stopping and self._outcome == "suspend"

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

    def _attached(self) -> None:
        if self._detach_timer:
            self._detach_timer.cancel()
            self._detach_timer = None

    def _detached(self) -> None:
        if self.over:
            return
        if self.plan.abort_on_disconnect:
            self.stop("discard")
            return
        loop = asyncio.get_running_loop()
        self._detach_timer = loop.call_later(self.desk.settings.detached_turn_seconds, self.stop, "suspend")

    # --- what the turn does --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run to the end. The caller holds the lease and releases it afterwards."""
        self.desk.turns[self.turn_id] = self
        try:
            await self._start()
            ended = await self._ended
            self.clock.ended = self.clock.ended or time.perf_counter()
            await self._written()
            error = self._broken or ended.error
            if error is not None:
                raise error
            await self._finish(ended)
        except SessiondError as error:
            await self._fail(error)
        except Exception as error:
            log.exception("turn failed", turn=self.turn_id)
            await self._fail(SessiondError(f"the turn failed: {error}"))
        finally:
            self.desk.turns.pop(self.turn_id, None)
            self._attached()
            self.stream.wake()
            self._remember()

    async def commit_aborted(self) -> None:
        """Make a suspended turn a revision as it stands, without the engine. The caller holds the lease."""
        self._accept(new=0, reused=len(self.live.ids) + len(self.plan.prompt))
        await self._finish(Ended(self.turn_id, FinishReason.ABORTED))
        record, request = self.plan.record, self.plan.request
        self.desk.explanations.committed(record.tenant, record.session_id, request.request_id, self.turn_id)

    async def _start(self) -> None:
        plan, live = self.plan, self.live
        held = len(live.ids) + len(plan.prompt)
        if plan.kind != "append":  # may refuse the turn, which then has used up no request_id
            expected = min(plan.sampling.max_tokens or EXPECTED_TOKENS, EXPECTED_TOKENS)
            await self.desk.make_room(live, plan.policy, held, held + expected)
        opening = asyncio.create_task(self._open()) if plan.attachment == "started" else None
        try:
            if plan.kind != "append":
                began = time.perf_counter()
                await self._warm(held)
                self.clock.restoring = time.perf_counter() - began
        finally:
            if opening is not None:
                await opening
        if plan.kind == "append":
            self._accept(new=len(plan.prompt), reused=len(live.ids))
            self._ended.set_result(Ended(self.turn_id, FinishReason.STOP))
            return
        assert live.cache is not None
        have = live.cache.length
        tokens = [*live.ids.tolist(), *plan.prompt]
        sampler = Sampler(plan.sampling, self.desk.vocab_size, tokens)
        known = max(computed_upto(live.chain), live.cache.length)
        model = self.desk.engine.model
        self.reading = Reading(model.shape, model.facts.attending, model.sliding_window, exact_tier(live.cache))
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
            stream=self._text,
            policy=plan.policy,
            turn_start=len(live.ids),
            reading=self.reading,
            tenant=plan.record.tenant,
            priority=plan.priority,
        )
        for token in work.replayed:
            self.stream.tokens.append(Tokens.of(token))
        computed = sum(piece.end - piece.start for piece in work.pieces)
        if self.stream.restored is not None:
            self._explain_restoration(self.stream.restored, work, have)
            if not (self.stream.restored.tokens_restored or self.stream.restored.recomputed):
                self.stream.restored = None  # there was nothing to restore
        self.desk.reused_tokens += len(tokens) - computed
        self._accept(new=computed, reused=len(tokens) - computed)
        if work.ended_before:
            self._ended.set_result(work.ended_before)
        elif self._stopping:
            self._ended.set_result(Ended(self.turn_id, FinishReason.ABORTED))
        else:
            self._submitted = True
            self.desk.engine.submit(work)

    async def _warm(self, held: int) -> None:
        """Have the KV in memory that is to be had: the history's, and cells of the prompt that others computed."""
        cache, plan, cell_tokens = self.live.cache, self.plan, self.desk.store.cell_tokens
        if cache is not None:
            if plan.attachment == "started":  # positions beyond the history are of a turn that was given up
                cache.truncate(len(self.live.ids), cell_tokens)
            history = min(len(self.live.ids), computed_upto(self.live.chain))
            if cache.length >= history and (held - cache.length < cell_tokens or not plan.record.seal):
                return
        self.stream.restored = await self.desk.warm(self.live, plan.prompt, share=plan.record.seal)

    def _accept(self, new: int, reused: int) -> None:
        self.stream.accepted = Accepted(
            base_revision=self.plan.request.base_revision,
            turn_revision=self.turn_id,
            new=new,
            reused=reused,
            drift=self.plan.drift,
            attachment=self.plan.attachment,
            log_start=len(self.live.ids),
        )
        self.stream.wake()

    async def _open(self) -> None:
        await open_turn(self.desk, self.live, self.plan)
        self._opened = True

    def _explain_restoration(self, restored: Restoration, work: TurnWork, have: int) -> None:
        missing = max(0, work.known - have)
        if missing:
            never_here = bool(self.live.chain and self.live.chain[-1].extra.get("moved"))
            cause = "corrupt" if restored.corrupt else "identity" if never_here else "not_persisted"
            restored.recomputed.append(Recompute(cause, missing, restored.corrupt))
        history = len(self.live.ids)
        again = work.recomputed(max(history, have), work.computed_before) if self.plan.logged else 0
        if again:
            restored.recomputed.append(Recompute("interrupted", again))

    def end(self, ended: Ended) -> None:
        """The engine is done with the turn."""
        if not self._ended.done():
            self.clock.ended = time.perf_counter()
            self._ended.set_result(ended)

    def log_token(self, event: TokenOut) -> None:
        """Queue a token for the log, on the engine thread; the loop hears of it when it is durable."""
        if self._broken:
            return  # the log must have no gap
        call, tenant, start = self.desk.handover.call, self.plan.record.tenant, len(self.plan.prompt) + event.index
        self.generated.append(event.sampled.token_id)
        tokens = Tokens.of(event)
        try:
            batch = LogBatch()
            batch.append_tokens(tenant, self.turn_id, start, np.array([event.sampled.token_id], np.uint32))
            durable = self._last_write = self.desk.store.log.write(batch)
        except Exception as error:  # noqa: BLE001 - it is this turn's, not the engine's
            call(partial(self._break_off, _as_ours(error)))
            return
        if self.desk.settings.stream_before_log:
            call(lambda: self._publish(tokens))
        else:
            durable.add_done_callback(lambda future: call(lambda: self._durable(future, tokens)))

    def _durable(self, future: Future[None], tokens: Tokens) -> None:
        error = future.exception()
        if error is None:
            self._publish(tokens)
        else:
            self._break_off(_as_ours(error))

    async def _written(self) -> None:
        """Return once the last token is durable, or refused and the turn broken off."""
        if self._last_write is None:
            return
        try:
            await asyncio.wrap_future(self._last_write)
        except SessiondError as error:
            self._break_off(error)

    def _break_off(self, error: SessiondError) -> None:
        """The log takes no more tokens: stop computing them. The turn is over when the engine lets go of its cache."""
        if not self._broken:
            self._broken = error
            self.desk.engine.cancel(self.turn_id)

    def _publish(self, tokens: Tokens) -> None:
        if not self._first_token_at:
            self._first_token_at = time.perf_counter()
        self.stream.tokens.append(tokens)
        self.stream.wake()

    # --- how it ends ---------------------------------------------------------------------------------------------

    async def _finish(self, ended: Ended) -> None:
        desk, live, plan = self.desk, self.live, self.plan
        aborted = ended.reason is FinishReason.ABORTED
        if aborted and self._outcome == "suspend":
            request = await suspend_turn(desk, plan.request)
            self.stream.failure = self._told or desk.suspended_error(request)
        elif aborted and self._outcome == "discard":
            await discard_turn(desk, live, plan.request)
            self.stream.finished = NOTHING
        else:
            generated, answer, stop = self._cut(ended)
            finished = self._summary(ended.reason, generated, answer, stop)
            await commit_turn(desk, live, plan, finished, generated, aborted=aborted)
            self.stream.finished = finished

    def _cut(self, ended: Ended) -> tuple[list[int], str, str]:
        """Tokens that stay in the log, the answer's text, and the stop string that ended it; the cache keeps no others.

        After a stop string the model remembers what the user saw: tokens wholly before it, and the visible part of a
        token that it splits, encoded again.
        """
        generated, hit = self.generated, ended.stop_hit
        if hit is not None:
            generated = generated[: hit.n_whole_tokens]
        if self.live.cache:
            kept = len(self.live.ids) + len(self.plan.prompt) + len(generated)
            self.live.cache.truncate(kept, self.desk.store.cell_tokens)
        if hit is None:
            shown = generated[:-1] if generated and generated[-1] in self._stop_ids else generated
            return generated, self.desk.decode(shown), ""
        rest = self.desk.encode(hit.visible_rest) if hit.visible_rest else []
        return generated + rest, self.desk.decode(generated) + hit.visible_rest, hit.stop

    def _summary(self, reason: FinishReason, generated: list[int], answer: str, stop: str) -> Finished:
        assert self.stream.accepted is not None
        now = time.perf_counter()
        decoding = now - self._first_token_at if self._first_token_at else 0.0
        count = len(self.generated) - len(self.plan.logged)
        cache = self.live.cache
        return Finished(
            revision=self.turn_id,
            reason=None if self.plan.kind == "append" else reason,
            stop=stop,
            committed=len(self.live.ids) + len(self.plan.prompt) + len(generated),
            usage={"new": self.stream.accepted.new, "reused": self.stream.accepted.reused, "generated": len(generated)},
            ttft_ms=(self._first_token_at - self.clock.began) * 1e3 if self._first_token_at else 0.0,
            tokens_per_second=(count - 1) / decoding if count > 1 and decoding > 0 else 0.0,
            answer=answer,
            memory=_memory(cache) if cache else {},
            notices=self.notices(),
        )

    def notices(self) -> tuple[str, ...]:
        """What a person should know of how it ran."""
        selection = self.live.cache.selection if self.live.cache else None
        if not self._submitted or selection is None or selection.failure is None:
            return ()
        return (f"policy {selection.policy.name!r} failed ({selection.failure}): from then on all tokens took part",)

    def _remember(self) -> None:
        """Keep what the turn read for who asks. Nothing is awaited: its clients have not yet heard that it is over."""
        if self.live.cache and self.live.cache.selection:
            self.live.cache.selection.reading = None
        if self.stream.accepted:
            record = self.plan.record
            told = explanation(self)
            self.live.attention_mass = attention_mass(told.reads)
            self.desk.explanations.remember(record.tenant, record.session_id, told)

    async def _fail(self, error: SessiondError) -> None:
        """Tell the client and the log. The session keeps its head.

        Where the store failed, the request stays open: what was acknowledged is in the log, and the turn can go on. Its
        KV stays too: it is that of the logged tokens, and where it reaches beyond them `TurnWork` cuts it off.
        """
        if self._opened and not isinstance(error, (ResourceExhausted, StoreReadOnly, Unavailable)):
            told = {"reason": error.reason, "message": error.message}
            try:
                await discard_turn(self.desk, self.live, self.plan.request, told)
            except Exception as second:
                log.exception("failed turn could not be closed in the log", turn=self.turn_id, error=str(second))
        self.stream.failure = error


def _memory(cache: SessionCache) -> dict[str, int]:
    """Bytes of a session's KV, and of what was derived from it, by tier."""
    exact = cache.length * cache.shape.bytes_per_token
    return {"device": cache.nbytes, "disk": exact} if cache.is_offloaded else {"device": cache.nbytes}


def _as_ours(error: BaseException) -> SessiondError:
    """The failure of a token's write, which ends the turn."""
    if isinstance(error, SessiondError):
        return error
    log.error("a token could not be logged", exc_info=error)
    ours = SessiondError(f"{type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours
