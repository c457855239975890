"""Which work runs in the next step: a share of a prefill piece, then one packed decode of all turns; sealing when idle.

A piece of a prompt is one forward in a step of its own, whatever else runs. While turns decode, its layers are spread
over time: it advances by whole layers for about as long as the recent decode steps took, rests, a token of every
decoding turn is computed, and it goes on. A long prefill then makes the others' tokens come at about half their pace,
however long its history is, and runs at about half of its own. Without decoding turns it runs through, unless somebody
waits for the engine. Sealing and scoring rest in the same way as soon as a turn comes.

Who rests has written KV in some layers and not in others, at positions that nobody reads: they count when all layers
are done. Taken out before that, it leaves a cache as clean as a step that failed.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from sessiond.forward import ForwardStep
from sessiond.idlework import IdleLine, ScoreWork, SealWork
from sessiond.line import Line
from sessiond.model import Feed, Model
from sessiond.stepevents import Counters, Ended, Event
from sessiond.turnwork import Piece, TurnWork
from sessiond.types import FinishReason

T = TypeVar("T")

PREFILL_SHARE = 1.0  # time a prefill advances between two decode steps, in recent decode steps


@dataclass(slots=True)
class Scheduler:
    """The queue of the engine thread; every method runs on it.

    `gives_way`: whether somebody waits for the engine, and what may rest is to rest. `most_rows`: decoding turns in one
    forward, if more than that could change each other's bits.
    """

    model: Model
    cell_tokens: int
    prefilling: Line = field(default_factory=Line)
    decoding: list[TurnWork] = field(default_factory=list)
    behind: IdleLine = field(default_factory=IdleLine)
    counters: Counters = field(default_factory=Counters)
    gives_way: Callable[[], bool] | None = None
    most_rows: int | None = None
    prefill_share: float = PREFILL_SHARE
    clock: Callable[[], float] = time.perf_counter
    _piece: tuple[TurnWork, Piece, ForwardStep] | None = None  # a prefill's, under way
    _decode_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=15))

    @property
    def idle(self) -> bool:
        return not (self.prefilling or self.decoding or self.sealing or self.scoring)

    @property
    def sealing(self) -> deque[SealWork]:
        return self.behind.sealing

    @property
    def scoring(self) -> deque[ScoreWork]:
        return self.behind.scoring

    def add(self, work: TurnWork) -> None:
        self.behind.leave(work.cache)
        if work.pieces:
            self.prefilling.add(work)
        else:
            self.decoding.append(work)

    def cancel(self, turn_id: str) -> list[Event]:
        """Take a turn out between steps. Its KV stays; tokens sampled so far were delivered."""
        for work in (*self.prefilling, *self.decoding):
            if work.turn_id == turn_id:
                self._take_out(work)
                return [Ended(turn_id, FinishReason.ABORTED)]
        return []

    def _take_out(self, work: TurnWork) -> None:
        if work in self.decoding:
            self.decoding.remove(work)
        else:
            self.prefilling.remove(work)
        if self._piece is not None and self._piece[0] is work:
            self._piece = None

    def cancel_idle(self, owner: str) -> None:
        """Take a session's sealing and scoring out between steps. Its cache is clean afterwards."""
        self.behind.cancel(owner)

    def step(self) -> list[Event]:
        """Run the next piece of work: a share of a prefill and a decode step, or else a cell to seal, or to score."""
        events: list[Event] = []
        decoding = list(self.decoding)  # a turn whose first token comes now decodes in the next step
        if self.prefilling:
            events += self._prefill(self._slice() if decoding else self._may_rest)
        if decoding:
            events += self._decode_all(decoding)
        elif not events and not self.prefilling and not self.decoding:
            advance = self.behind.advance
            events += self._timed(lambda: advance(self.model, self.cell_tokens, self._may_rest, self.counters))
        self.counters.steps += 1
        return events

    def _timed(self, forward: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return forward()
        finally:
            self.counters.forward_seconds += time.perf_counter() - began

    def _may_rest(self) -> bool:
        return self.gives_way is not None and self.gives_way()

    def _slice(self) -> Callable[[], bool]:
        """Whether a prefill has had its time beside turns that decode."""
        recent = statistics.median(self._decode_seconds) if self._decode_seconds else 0.0
        until = self.clock() + self.prefill_share * recent
        return lambda: self.clock() >= until

    def _failed(self, works: list[TurnWork], error: Exception) -> list[Event]:
        """A step that raises ends its turns with the error; other sessions and the thread go on."""
        for work in works:
            self._take_out(work)
        return [Ended(work.turn_id, FinishReason.ABORTED, error=error) for work in works]

    # --- prompts -------------------------------------------------------------------------------------------------

    def _prefill(self, enough: Callable[[], bool]) -> list[Event]:
        """Advance the piece under way, or else the next one in line; whoever waits for its end gets it then."""
        work = self._piece[0] if self._piece is not None else self.prefilling.next()
        try:
            piece, step = self._piece[1:] if self._piece is not None else self._begin_piece(work)
            logits = self._timed(lambda: step.advance(enough))
            if logits is None:
                return []
            self._piece = None
            return self._piece_done(work, piece, logits)
        except Exception as error:  # noqa: BLE001 - the engine's boundary: nothing may end the thread
            return self._failed([work], error)

    def _begin_piece(self, work: TurnWork) -> tuple[Piece, ForwardStep]:
        piece = work.pieces.popleft()
        wants_token = not work.pieces and not work.pending
        feed = Feed(work.cache, work.tokens[piece.start : piece.end], piece.start, work.cache.selection)
        work.before_piece(piece)
        step = self.model.begin([feed], [piece.end - piece.start - 1] if wants_token else [])
        self._piece = work, piece, step
        return piece, step

    def _piece_done(self, work: TurnWork, piece: Piece, logits: Tensor) -> list[Event]:
        work.after_piece(piece)
        self.counters.prefilled += piece.end - piece.start
        self.counters.recomputed += work.recomputed(piece.start, piece.end)
        if work.pieces:
            return []
        self.prefilling.remove(work)
        events, over = self._sample(work, logits[0]) if len(logits) else ([], False)
        if not over:
            self.decoding.append(work)
        return events

    # --- tokens --------------------------------------------------------------------------------------------------

    def _decode_all(self, works: list[TurnWork]) -> list[Event]:
        """One token of every turn, in as few forwards as may be."""
        began, events = self.clock(), []
        most = self.most_rows or len(works)
        for first in range(0, len(works), most):
            together = works[first : first + most]
            try:
                events += self._decode(together)
            except Exception as error:  # noqa: BLE001 - the engine's boundary: nothing may end the thread
                events += self._failed(together, error)
        self._decode_seconds.append(self.clock() - began)
        return events

    def _decode(self, works: list[TurnWork]) -> list[Event]:
        for work in works:
            work.before_token()
        feeds = [
            Feed(work.cache, [work.pending.popleft()], work.cache.length, work.cache.selection, decoding=True)
            for work in works
        ]
        rows = [row for row, work in enumerate(works) if not work.pending]
        logits = self._timed(self.model.begin(feeds, rows).advance)
        assert logits is not None
        for work in works:
            work.cache.length += 1
            self.counters.recomputed += work.recomputed(work.cache.length - 1, work.cache.length)
        events: list[Event] = []
        for i, row in enumerate(rows):
            work = works[row]
            more, over = self._sample(work, logits[i])
            events += more
            if over:
                self.decoding.remove(work)
        return events

    def _sample(self, work: TurnWork, logits: Tensor) -> tuple[list[Event], bool]:
        """The turn's next token from logits [V]. What raises here ends this turn only: the step's KV is good."""
        try:
            sampled = work.sampler.sample(logits, work.generated)
            self.counters.decoded += 1
            return work.accept(sampled)
        except Exception as error:  # noqa: BLE001 - the engine's boundary: nothing may end the thread
            return [Ended(work.turn_id, FinishReason.ABORTED, error=error)], True
