"""Work on a session's KV that waits while turns want the model: sealing its history, and scoring it.

Each runs one forward at a time, of a cell or a piece, which rests between two layers when a turn comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sessiond.cache import SessionCache
from sessiond.forward import ForwardStep
from sessiond.model import Feed, Model
from sessiond.stepevents import CellSealed, Counters, Event, Scored
from sessiond.zipping import Scoring


@dataclass(slots=True, eq=False)
class SealWork:
    """Cells [cache.sealed, upto) of a session to be computed canonically, one a forward."""

    owner: str
    cache: SessionCache
    tokens: Sequence[int]
    upto: int

    def begin(self, model: Model, cell_tokens: int) -> ForwardStep | None:
        """The forward of the next cell; None if there is none."""
        start = self.cache.sealed
        if start + cell_tokens > self.upto:
            return None
        return model.begin([Feed(self.cache, self.tokens[start : start + cell_tokens], start)], [])

    def finish(self, cell_tokens: int, counters: Counters) -> list[Event]:
        """The forward is over: its cell is sealed."""
        start = self.cache.sealed
        self.cache.sealed = start + cell_tokens
        self.cache.length = max(self.cache.length, self.cache.sealed)
        counters.sealed += cell_tokens
        return [CellSealed(self.owner, start // cell_tokens)]

    def over(self, error: Exception | None = None) -> Event:
        return CellSealed(self.owner, -1, error)

    def abandon(self) -> None:
        """Nothing to clean: a cell that was computed in part is as provisional as before."""


@dataclass(slots=True, eq=False)
class ScoreWork:
    """A session's history to be scored, one piece a forward."""

    owner: str
    scoring: Scoring

    @property
    def cache(self) -> SessionCache:
        return self.scoring.cache

    def begin(self, model: Model, cell_tokens: int) -> ForwardStep | None:
        """The forward of the next piece; None if there is none."""
        return None if self.scoring.is_over else self.scoring.begin_piece(model)

    def finish(self, cell_tokens: int, counters: Counters) -> list[Event]:
        """The forward is over. With the last piece so is the scoring."""
        counters.probed += self.scoring.finish_piece()
        return []

    def over(self, error: Exception | None = None) -> Event:
        return Scored(self.owner, error)

    def abandon(self) -> None:
        self.scoring.abandon()


@dataclass(slots=True)
class IdleLine:
    """What sessions have to seal and to score; sealing goes first. At most one forward of it is under way."""

    sealing: deque[SealWork] = field(default_factory=deque)
    scoring: deque[ScoreWork] = field(default_factory=deque)
    _under_way: tuple[SealWork | ScoreWork, ForwardStep] | None = None

    def advance(self, model: Model, cell_tokens: int, enough: Callable[[], bool], counters: Counters) -> list[Event]:
        """Compute layers of the forward under way, or else of the next one, until `enough` says so."""
        work = self._under_way[0] if self._under_way else next(self._waiting(), None)
        if work is None:
            return []
        try:
            step = self._under_way[1] if self._under_way else work.begin(model, cell_tokens)
            if step is None:
                return [self._over(work)]
            self._under_way = work, step
            if step.advance(enough) is None:
                return []
            self._under_way = None
            return work.finish(cell_tokens, counters)
        except Exception as error:  # noqa: BLE001 - the engine's boundary: nothing may end the thread
            return [self._over(work, error)]

    def _waiting(self) -> Iterator[SealWork | ScoreWork]:
        yield from self.sealing
        yield from self.scoring

    def _over(self, work: SealWork | ScoreWork, error: Exception | None = None) -> Event:
        self._drop(work)
        return work.over(error)

    def leave(self, cache: SessionCache) -> None:
        """A turn takes a session's cache: a forward that rests in it is given up, and begins again later."""
        if self._under_way is not None and self._under_way[0].cache is cache:
            self._under_way[0].abandon()
            self._under_way = None

    def cancel(self, owner: str) -> None:
        for work in list(self._waiting()):
            if work.owner == owner:
                self._drop(work)

    def _drop(self, work: SealWork | ScoreWork) -> None:
        if self._under_way is not None and self._under_way[0] is work:
            self._under_way = None
        if isinstance(work, SealWork):
            self.sealing.remove(work)
        else:
            self.scoring.remove(work)
        work.abandon()
