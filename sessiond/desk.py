"""What all sessions and turns share: store, engine, tiers, tokenizer, settings, and the way between them."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import structlog

from sessiond.backing import Backing
from sessiond.branch import Ids
from sessiond.cache import SessionCache, hot_bytes_per_token, reserved_bytes
from sessiond.config import Settings
from sessiond.engine import Engine
from sessiond.errors import DiskFull, MemoryBudget, SessiondError, TurnSuspended
from sessiond.explanations import Explanations
from sessiond.handover import Handover
from sessiond.idlework import ScoreWork, SealWork
from sessiond.lifecycle import Event as Change
from sessiond.live import Live
from sessiond.policies import registry
from sessiond.policies.base import Policy, Situation
from sessiond.restoring import Restoration
from sessiond.sampling import SamplingParams
from sessiond.scrub import Scrub
from sessiond.sharing import relative, sealed_donor, take_over
from sessiond.stepevents import CellSealed, Ended, Event, Scored, TokenOut
from sessiond.storage.batch import LogBatch
from sessiond.storage.catalog import SessionRow
from sessiond.storage.records import RequestRecord, SessionRecord
from sessiond.storage.store import Store
from sessiond.template import ChatTemplate
from sessiond.textstream import Detokenizer, TextStream
from sessiond.tiers import Tiers
from sessiond.turnplaces import TurnPlaces
from sessiond.types import Tier
from sessiond.zipping import Scoring, instruction_for

if TYPE_CHECKING:
    from sessiond.turn import Turn

log = structlog.get_logger()

FEW_CELLS = 4  # coded at a time behind a turn: some 30 ms of both cores

T = TypeVar("T")
Key = tuple[str, str]


class Desk:
    """Owned by the event loop. Blocking work goes to pools; the engine's events come back through `post`."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        engine: Engine,
        tiers: Tiers,
        tokenizer: Any,
        template: ChatTemplate,
        identity_id: str,
    ) -> None:
        self.settings = settings
        self.store = store
        self.engine = engine
        self.tiers = tiers
        self.tokenizer = tokenizer
        self.detokenizer = Detokenizer(tokenizer)
        self.template = template
        self.identity_id = identity_id
        self.vocab_size = engine.model.vocab_size
        self.max_context = engine.model.max_context
        self.stop_ids = frozenset(template.stop_ids)
        self.turns: dict[str, Turn] = {}
        self.lives: dict[Key, Live] = {}
        self._known: weakref.WeakValueDictionary[Key, Live] = weakref.WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.restored_tokens = 0
        self.reused_tokens = 0
        self.places = TurnPlaces(settings.max_queued_turns)
        self.aside_bytes = 0  # of memory that no session holds: an audit's
        self.scrub = Scrub(store)
        self.explanations = Explanations()
        self._loop = asyncio.get_running_loop()
        self.handover = Handover(self._loop)
        self._idle_work: dict[str, asyncio.Future[None]] = {}
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="store")
        self._sql = ThreadPoolExecutor(1, thread_name_prefix="sql")

    def close(self) -> None:
        self._pool.shutdown()
        self._sql.shutdown()
        self.tiers.close()

    # --- text ----------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        return self.detokenizer.decode(ids)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def new_stream(self, stop: Sequence[str] = (), goes_on_from: Ids | None = None) -> TextStream:
        """`goes_on_from`: the history, where the answer goes on with it instead of beginning behind a prompt."""
        return TextStream(self.detokenizer, stop, [] if goes_on_from is None else goes_on_from[-32:].tolist())

    def stop_ids_of(self, sampling: SamplingParams) -> frozenset[int]:
        """Tokens that end a turn: the model's and the request's."""
        return self.stop_ids | frozenset(sampling.stop_token_ids)

    def check_policy(self, name: str, knobs: Mapping[str, Any]) -> None:
        """Raises UnknownPolicy or InvalidConfig unless there is such a policy and the model can run under it."""
        registry.parse(name, knobs).fits(self.engine.model.facts)

    # --- between threads -----------------------------------------------------------------------------------------

    def post(self, events: list[Event]) -> None:
        """Called by the engine thread once a step.

        Tokens go straight to the log's writer, all of a step together, and reach the loop when they are durable: every
        thread that is woken takes a core from the next step.
        """
        rest: list[Event] = []
        with self.store.log.together():
            for event in events:
                if not isinstance(event, TokenOut):
                    rest.append(event)
                elif turn := self.turns.get(event.turn_id):
                    turn.log_token(event)
        if rest:
            self.handover.call(lambda: self._dispatch(rest))

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, CellSealed | Scored):
                if event.error is not None:
                    what = "sealing" if isinstance(event, CellSealed) else "scoring"
                    log.error("idle work stopped", what=what, session=event.owner, error=str(event.error))
                waiting = self._idle_work.get(event.owner)
                if waiting and event.is_over and not waiting.done():
                    waiting.set_result(None)
            elif isinstance(event, Ended) and (turn := self.turns.get(event.turn_id)):
                turn.end(event)

    async def in_pool(self, function: Callable[..., Any], *args: Any) -> Any:
        return await self._loop.run_in_executor(self._pool, function, *args)

    async def in_sql(self, function: Callable[..., Any], *args: Any) -> Any:
        return await self._loop.run_in_executor(self._sql, function, *args)

    async def whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end even if the caller is cancelled: what is half done in the log stays wrong in memory."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    # --- the session record and its index ------------------------------------------------------------------------

    @staticmethod
    def now_us() -> int:
        return time.time_ns() // 1000

    async def edit(self, live: Live, build: Callable[[SessionRecord], LogBatch]) -> SessionRecord:
        """Read a session's record, let `build` turn it into a batch, and wait until that is durable.

        Edits of one session follow each other, so none is lost. Returns the record as stored afterwards.
        """

        async def write() -> SessionRecord:
            async with live.editing:
                batch = build(self.store.log.session(live.tenant, live.session_id))
                await asyncio.wrap_future(self.store.log.write(batch))
                record = self.store.log.session(live.tenant, live.session_id)
            self.index(record)
            return record

        return await self.whole(write())

    def index(self, record: SessionRecord) -> None:
        """Bring the SQL index up to date, in its own time; what is missed is reconciled at the next start."""
        future = self._sql.submit(self.store.catalog.upsert_sessions, [SessionRow.of(record)])
        future.add_done_callback(_report)

    # --- memory --------------------------------------------------------------------------------------------------

    def live(self, tenant: str, session_id: str) -> Live:
        key = (tenant, session_id)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Live(tenant, session_id)
        self.lives[key] = found
        return found

    def forget(self, live: Live) -> None:
        """Drop what is known in memory of a session that is cold. Who holds it, or waits for it, goes on with it."""
        if live.cache is None and not live.lease.locked():
            self.lives.pop((live.tenant, live.session_id), None)

    @property
    def hot_sessions(self) -> int:
        return sum(live.cache is not None for live in list(self.lives.values()))

    @property
    def hot_bytes(self) -> int:
        return self.aside_bytes + sum(self._bytes_held(live) for live in list(self.lives.values()))

    def _bytes_held(self, live: Live) -> int:
        """Bytes of a session's KV in memory, or that its running turn may fill."""
        return max(live.cache.nbytes if live.cache else 0, live.reserved)

    async def warm(self, live: Live, ahead: Sequence[int] = (), *, share: bool = True) -> Restoration:
        """Bring KV of a session's history, and shared cells of the tokens `ahead` of it, into its memory.

        The lease must be held, the history loaded, room made. `share` off: nothing of other sessions.
        """
        tokens = np.concatenate([live.ids, np.array(ahead, np.uint32)])
        others = list(self.lives.values()) if share else []
        donor = sealed_donor(others, live, tokens, self.store.cell_tokens)
        report: Restoration
        if live.cache is None:
            restore = partial(self.tiers.restore, donor=donor, share=share, backing=live.backing)
            live.cache, report = await self.in_pool(restore, live.tenant, live.chain, tokens)
            live.persisted = live.cache.length if report.tier is Tier.DISK else 0
            live.advance(Change.WARM)
        else:
            fill = partial(self.tiers.restorer.fill, donor=donor, share=share)
            report = await self.in_pool(fill, live.tenant, live.chain, tokens, live.cache)
            live.cache.release_all()
        if live.cache.length < len(live.ids) and (found := relative(others, live)):
            copying = self.engine.call(partial(take_over, live, *found), urgent=True)
            report.tokens_restored += await asyncio.wrap_future(copying)
        self.restored_tokens += report.tokens_restored
        return report

    def situation(self, live: Live, n_tokens: int) -> Situation:
        """What a policy may go by when a turn of `n_tokens` in all is planned."""
        return Situation(n_tokens, self.hot_bytes / self.settings.memory_budget_bytes, live.attention_mass)

    def policy_now(self, live: Live, record: SessionRecord) -> Policy:
        """What a turn of the session would run under that adds nothing to it."""
        return registry.stored(record.policy).settle_on(self.situation(live, len(live.ids)))[0]

    async def make_room(self, live: Live, policy: Policy, held: int, tokens: int) -> None:
        """Push out idle sessions, least recently used first, until this one fits with `tokens`. Raises MemoryBudget.

        The room stays reserved until the turn has ended (`Live.reserved`). `held`: tokens before any is generated.
        A session that is cold and whose policy reads little of its exact KV gets a file for that.
        """
        live.give_room_back()
        backing = None
        if live.cache is None and policy.offloads and self.settings.offload:
            backing = await self.in_pool(self.tiers.memory.open_file)
        offloaded = backing is not None if live.cache is None else live.cache.is_offloaded
        whole = live.cache is None and not offloaded and self.tiers.memory.is_long(held)  # in huge pages
        n_tokens = self.tiers.capacity if whole else min(tokens, self.tiers.capacity)
        wanted = n_tokens * hot_bytes_per_token(self.tiers.shape, policy, self.engine.model.facts, offloaded=offloaded)
        await self._push_out(max(0, wanted - self._bytes_held(live)), live)
        live.reserved, live.backing = wanted, backing

    async def set_aside(self, needed: int) -> None:
        """Make room for `needed` bytes beside the sessions', counted in `aside_bytes` until that is lowered again.

        Raises MemoryBudget.
        """
        await self._push_out(needed)
        self.aside_bytes += needed

    async def _push_out(self, needed: int, besides: Live | None = None) -> None:
        """Let idle sessions leave, least recently used first, until `needed` bytes fit. Raises MemoryBudget."""
        budget = self.settings.memory_budget_bytes
        idle = [
            other for other in self.lives.values() if other.cache and not other.lease.locked() and other is not besides
        ]
        for other in sorted(idle, key=lambda other: other.last_used):
            if self.hot_bytes + needed <= budget:
                break
            if other.lease.locked():  # never wait for a lease while holding one
                continue
            try:
                await self.suspend(other)
            except SessiondError as error:  # its trouble, not this one's; the next may leave
                log.error("session cannot leave memory", session=other.session_id, error=error.message)
        if self.hot_bytes + needed > budget:
            raise MemoryBudget(
                f"{needed} bytes of KV do not fit: {self.hot_bytes} of {budget} are in use by running turns",
                retry_after=self.places.until_free(),
                needed_bytes=needed,
                used_bytes=self.hot_bytes,
                budget_bytes=budget,
            )

    async def suspend(self, live: Live) -> tuple[int, int]:
        """Persist and leave memory. Returns bytes written and freed.

        Where the disk is full, KV that lies in a file is dropped all the same: that frees the disk, and the log has
        every token. Other KV stays; raises DiskFull.
        """

        async def leave() -> tuple[int, int]:
            async with live.lease:
                await self.unsettle(live)
                if not live.cache:
                    return 0, 0
                try:
                    written = await self.persist(live)
                except DiskFull as error:
                    if not live.cache.is_offloaded:
                        raise
                    written = 0
                    log.warning("KV is dropped for want of disk space", session=live.session_id, error=error.message)
                cache, freed = live.cache, live.drop_cache()
                await self.in_pool(self.tiers.memory.give_back, cache)
                return written, freed

        return await self.whole(leave())

    # --- after a turn --------------------------------------------------------------------------------------------

    def settle(self, live: Live) -> None:
        """Seal and persist in the background; the next turn may interrupt it at any point."""
        live.settling = asyncio.create_task(self._settle(live))

    async def unsettle(self, live: Live) -> None:
        """Stop background work on a session: its cache belongs to the caller (who holds the lease) afterwards."""
        if live.settling is None:
            if live.saving:  # of a suspending that was given up
                await asyncio.wait([live.saving])
            return
        assert live.settling is not asyncio.current_task()
        live.settling.cancel()
        live.stop_saving.set()
        try:
            await asyncio.gather(live.settling, return_exceptions=True)
            self.engine.cancel_idle(live.owner)
            await asyncio.wrap_future(
                self.engine.call(_nothing, urgent=True)
            )  # a cell that was being sealed is done now
            if live.saving:
                await asyncio.wait([live.saving])
            live.settling = None
        finally:
            live.stop_saving.clear()

    async def _settle(self, live: Live) -> None:
        await asyncio.sleep(self.settings.settle_seconds)
        try:
            record = self.store.log.session(live.tenant, live.session_id)
            if record.seal and self.settings.seal and live.cache:
                await self._seal(live)
            await self.persist(live, gently=True)
            await self._rest(live)
            await self._place(live, self.policy_now(live, record))
            await self._score(live, registry.stored(record.policy))
        except DiskFull as error:
            live.unsaved = True  # the keeper tries again when there is space
            log.warning("KV waits for disk space", session=live.session_id, error=error.message)
        except SessiondError as error:
            log.error("KV could not be persisted", session=live.session_id, error=error.message)
        except Exception:
            log.exception("KV could not be persisted", session=live.session_id)  # nobody waits for this task's result

    async def _seal(self, live: Live) -> None:
        assert live.cache is not None
        upto = len(live.ids) // self.store.cell_tokens * self.store.cell_tokens
        await self.seal_cells(live.owner, live.cache, live.ids.tolist(), upto)

    async def _score(self, live: Live, policy: Policy) -> None:
        """Score what a session's prior lacks, if its policy wants one, and make that durable."""
        cache = live.cache
        if not policy.wants_prior or cache is None or cache.length > len(live.ids) or live.turn is not None:
            return
        scoring = self._scoring(live, cache, policy.prior_chunk)
        if not scoring.is_over:
            facts, shape = self.engine.model.facts, self.tiers.shape
            live.reserved = scoring.reach * hot_bytes_per_token(shape, policy, facts, offloaded=cache.is_offloaded)
            try:
                await self._when_idle(live.owner, lambda: self.engine.score(ScoreWork(live.owner, scoring)))
            finally:
                live.reserved = 0
                cache.release_all()
        if cache.prior is not None:
            await self._save(live, self.tiers.persist_prior, live.tenant, live.chain, cache.prior)

    def _scoring(self, live: Live, cache: SessionCache, chunk: int) -> Scoring:
        """What is to be scored of a session, within the memory that nobody uses."""
        ids = live.ids.tolist()
        free = (self.settings.memory_budget_bytes - self.hot_bytes) // self.tiers.shape.bytes_per_token
        return Scoring(
            cache,
            ids,
            instruction_for(self.template, self.encode, ids[cache.length - 1] if cache.length else None),
            n_system=live.chain[0].position_end if live.chain else 0,
            room=min(self.max_context - cache.length, free),
            piece=self.store.cell_tokens,
            chunk=chunk,
        )

    async def seal_cells(self, owner: str, cache: SessionCache, tokens: list[int], upto: int) -> None:
        """Compute cells [cache.sealed, upto) canonically, when no turn wants the model. Fewer, if a step failed."""
        await self._when_idle(owner, lambda: self.engine.seal(SealWork(owner, cache, tokens, upto)))

    async def _when_idle(self, owner: str, begin: Callable[[], None]) -> None:
        """Wait for the sealing or the scoring that `begin` queues; cancelled, it is taken out again."""
        over = self._idle_work[owner] = self._loop.create_future()
        begin()
        try:
            await over
        finally:
            self._idle_work.pop(owner, None)
            self.engine.cancel_idle(owner)

    async def persist(self, live: Live, *, gently: bool = False) -> int:
        """Make all KV of the head durable; `gently`: a few cells at a time, between turns. Returns bytes written."""
        cache, head, ids = live.cache, live.head, live.ids
        if cache is None:
            return 0
        written, most = 0, FEW_CELLS if gently else None
        while True:
            if gently:
                await self._between_turns()
            saved = await self._save(live, self.tiers.persist_cells, live.tenant, ids, cache, live.stop_saving, most)
            written += saved
            if not gently or not saved:
                break

        def snapshot() -> tuple[int, int, list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]]:
            whole = len(ids) // self.store.cell_tokens * self.store.cell_tokens
            start = min(cache.sealed, whole)
            return start, min(cache.borrowed, whole), cache.copies(start, max(start, min(cache.length, len(ids))))

        start, borrowed, arrays = await asyncio.wrap_future(self.engine.call(snapshot))
        older = [r.revision_id for r in live.chain[:-1] if r.session_id == live.session_id][-8:]
        written += await self._save(live, self.tiers.persist_tail, live.tenant, head, start, arrays, older, borrowed)
        cache.release_all()
        if live.head == head:
            live.persisted = start + (arrays[0][0].shape[1] if arrays else 0)
        return written

    async def _rest(self, live: Live) -> None:
        """Let what chooses in the session's layers catch up with its history, a layer at a time, between turns."""
        cache, rope = live.cache, self.engine.model.rope
        for layer in range(self.tiers.shape.n_layers):
            if cache is None or cache.selection is None:
                return
            await self._between_turns()
            rest = partial(cache.selection.rest, layer, cache.keys[layer], cache.values[layer], cache.length, rope)
            await asyncio.wrap_future(self.engine.call(rest))
            cache.release(layer)

    async def _place(self, live: Live, policy: Policy) -> None:
        """Move exact KV to the tier that the session's policy wants it in, if there is room."""
        cache, wanted = live.cache, policy.offloads and self.settings.offload
        if cache is None or cache.is_offloaded == wanted:
            return
        await self._between_turns()
        if wanted:
            if (backing := await self.in_pool(self.tiers.memory.open_file)) is not None:
                await self._save(live, cache.move, backing)
            return
        needed = cache.length * self.tiers.shape.bytes_per_token
        if self.hot_bytes + needed > self.settings.memory_budget_bytes:
            return  # nobody else leaves for that
        live.reserved = needed
        try:
            await self._save(live, cache.move, Backing(reserved_bytes(self.tiers.shape, self.tiers.capacity)))
        finally:
            live.reserved = 0

    async def _between_turns(self) -> None:
        """Wait until no turn runs; where there is always one, for a while."""
        for _ in range(20):
            if not self.turns:
                return
            await asyncio.sleep(0.05)

    async def _save(self, live: Live, function: Callable[..., T], *args: Any) -> T:
        """Run a pool's work on a session's cache. Cancelling the caller leaves it running; `unsettle` waits for it."""
        if live.saving:
            await asyncio.wait([live.saving])
        live.saving = self._loop.run_in_executor(self._pool, function, *args)
        return await asyncio.shield(live.saving)

    @staticmethod
    def suspended_error(request: RequestRecord) -> TurnSuspended:
        return TurnSuspended(
            f"turn {request.request_id} is suspended; come back with its request_id, or set supersede",
            request_id=request.request_id,
        )


def _nothing() -> None:
    """What the engine is asked to do by someone who waits for what it was doing."""


def _report(future: Any) -> None:
    error = future.exception()
    if error is not None:
        log.error("SQL index not updated", error=str(error))
