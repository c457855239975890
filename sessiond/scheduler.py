"""Which work runs in the next step: one prefill piece, then one packed decode of all turns; sealing when idle."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sessiond.attention import InterruptedStepError
from sessiond.idlework import ScoreWork, SealWork
from sessiond.model import Feed, Model
from sessiond.stepevents import CellSealed, Ended, Event, Scored
from sessiond.turnwork import TurnWork
from sessiond.types import FinishReason

MOST_ABANDONED = 4  # tries at a step of sealing or scoring before turns wait for it


@dataclass(slots=True)
class Counters:
    """Totals since start, in tokens or steps."""

    prefilled: int = 0  # positions computed in pieces, those computed again included
    recomputed: int = 0  # positions that turns computed again: made canonical, or lost with the memory that held them
    decoded: int = 0  # tokens sampled
    sealed: int = 0  # positions sealed behind the turns; those of canonical prefill pieces are not among them
    probed: int = 0  # tokens computed to score others
    steps: int = 0


@dataclass(slots=True)
class Scheduler:
    """The queue of the engine thread; every method runs on it."""

    model: Model
    cell_tokens: int
    prefilling: deque[TurnWork] = field(default_factory=deque)
    decoding: list[TurnWork] = field(default_factory=list)
    sealing: deque[SealWork] = field(default_factory=deque)
    scoring: deque[ScoreWork] = field(default_factory=deque)
    counters: Counters = field(default_factory=Counters)
    gives_way: Callable[[], bool] | None = None  # whether a step that may wait is to be abandoned

    @property
    def idle(self) -> bool:
        return not (self.prefilling or self.decoding or self.sealing or self.scoring)

    def add(self, work: TurnWork) -> None:
        if work.pieces:
            self.prefilling.append(work)
        else:
            self.decoding.append(work)

    def cancel(self, turn_id: str) -> list[Event]:
        """Take a turn out between steps. Its KV stays; tokens sampled so far were delivered."""
        for queue in (self.prefilling, self.decoding):
            for work in list(queue):
                if work.turn_id == turn_id:
                    queue.remove(work)
                    return [Ended(turn_id, FinishReason.ABORTED)]
        return []

    def cancel_idle(self, owner: str) -> None:
        """Take a session's sealing and scoring out between steps. Its cache is clean afterwards."""
        self.sealing = deque(work for work in self.sealing if work.owner != owner)
        for work in list(self.scoring):
            if work.owner == owner:
                self.scoring.remove(work)
                work.scoring.abandon()

    def step(self) -> list[Event]:
        """Run the next piece of work: a prefill piece and a decode step, or else one cell to seal, or to score with."""
        events: list[Event] = []
        decoding = list(self.decoding)  # a turn whose first token comes now decodes in the next step
        if self.prefilling:
            events += self._guarded([self.prefilling[0]], self._prefill)
        if decoding:
            events += self._guarded(decoding, self._decode)
        elif not events and not self.prefilling and not self.decoding:
            events += self._seal() if self.sealing else self._score() if self.scoring else []
        self.counters.steps += 1
        return events

    def _guarded(self, works: list[TurnWork], run: Callable[[list[TurnWork]], list[Event]]) -> list[Event]:
        """A step that raises ends its turns with the error; other sessions and the thread go on."""
        try:
            return run(works)
        except Exception as error:  # noqa: BLE001 - the engine's boundary: nothing may end the thread
            for work in works:
                if work in self.prefilling:
                    self.prefilling.remove(work)
                if work in self.decoding:
                    self.decoding.remove(work)
            return [Ended(work.turn_id, FinishReason.ABORTED, error=error) for work in works]

    def _prefill(self, works: list[TurnWork]) -> list[Event]:
        work = works[0]
        piece = work.pieces.popleft()
        last = not work.pieces
        wants_token = last and not work.pending
        feed = Feed(work.cache, work.tokens[piece.start : piece.end], piece.start, work.cache.selection)
        work.before_piece(piece)
        logits = self.model.step([feed], [piece.end - piece.start - 1] if wants_token else [])
        work.after_piece(piece)
        self.counters.prefilled += piece.end - piece.start
        self.counters.recomputed += work.recomputed(piece.start, piece.end)
        events: list[Event] = []
        if last:
            self.prefilling.popleft()
            over = False
            if wants_token:
                events, over = self._sample(work, logits[0])
            if not over:
                self.decoding.append(work)
        elif len(self.prefilling) > 1:
            self.prefilling.rotate(-1)
        return events

    def _decode(self, works: list[TurnWork]) -> list[Event]:
        for work in works:
            work.before_token()
        feeds = [
            Feed(work.cache, [work.pending.popleft()], work.cache.length, work.cache.selection, decoding=True)
            for work in works
        ]
        rows = [row for row, work in enumerate(works) if not work.pending]
        logits = self.model.step(feeds, rows)
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

    def _seal(self) -> list[Event]:
        work = self.sealing[0]
        cache, start = work.cache, work.cache.sealed
        if start + self.cell_tokens > work.upto:
            self.sealing.popleft()
            return [CellSealed(work.owner, -1)]
        end = start + self.cell_tokens
        try:
            self.model.step([Feed(cache, work.tokens[start:end], start)], [], self._gives_way_for(work))
        except InterruptedStepError:  # the cell is as provisional as before, and is computed again later
            work.abandoned += 1
            return []
        except Exception as error:  # noqa: BLE001 - the engine's boundary: nothing may end the thread
            self.sealing.popleft()
            return [CellSealed(work.owner, -1, error)]
        work.abandoned = 0
        cache.sealed = end
        cache.length = max(cache.length, end)
        self.counters.sealed += self.cell_tokens
        return [CellSealed(work.owner, start // self.cell_tokens)]

    def _gives_way_for(self, work: SealWork | ScoreWork) -> Callable[[], bool] | None:
        """Where turns come all the time a step is let through after some tries: else nothing would ever be sealed."""
        return self.gives_way if work.abandoned < MOST_ABANDONED else None

    def _score(self) -> list[Event]:
        work, error = self.scoring[0], None
        try:
            if not work.scoring.is_over:
                self.counters.probed += work.scoring.run_piece(self.model, self._gives_way_for(work))
            work.abandoned = 0
        except InterruptedStepError:
            work.abandoned += 1
            return []
        except Exception as raised:  # noqa: BLE001 - the engine's boundary: nothing may end the thread
            work.scoring.abandon()
            error = raised
        if error is None and not work.scoring.is_over:
            return []
        self.scoring.popleft()
        return [Scored(work.owner, error)]
