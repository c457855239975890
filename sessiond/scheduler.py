"""Which work runs in the next step: one prefill piece, then one packed decode of all turns; sealing when idle.

A prefill is cut into pieces (`plan_prefill`). Where at least a whole cell is new, cells are computed canonically: each
in a forward of its own, on top of sealed cells only, so that its KV is sealed at once. A short input is computed as it
is, provisionally, and sealed later off the token path.

    [0, sealed)                canonical
    [sealed, length)           provisional; recomputed by the first canonical piece that covers it
    [length, len(tokens))      to be computed by this turn
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from sessiond.attention import InterruptedStepError
from sessiond.cache import SessionCache
from sessiond.model import Feed, Model
from sessiond.policies.base import Policy
from sessiond.policies.full import Full
from sessiond.reading import Reading
from sessiond.sampling import Sampled, Sampler
from sessiond.textstream import StopHit, TextStream
from sessiond.types import FinishReason
from sessiond.zipping import Scoring

FULL = Full()
MOST_ABANDONED = 4  # tries at a step of sealing or scoring before turns wait for it


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions [start, end) computed in one forward."""

    start: int
    end: int
    canonical: bool


def plan_prefill(sealed: int, length: int, target: int, cell_tokens: int, seal: bool) -> list[Piece]:
    """Pieces that bring a cache from `length` to `target` positions (see the drawing above)."""
    if target - length < cell_tokens:
        return [Piece(length, target, False)] if target > length else []
    start = sealed if seal else length
    pieces = []
    while start < target:
        end = min(start // cell_tokens * cell_tokens + cell_tokens, target)
        pieces.append(Piece(start, end, seal and end - start == cell_tokens))
        start = end
    return pieces


@dataclass(frozen=True, slots=True)
class TokenOut:
    """One sampled token on its way to the log and the client. `text` may lag behind (UTF-8, stop strings)."""

    turn_id: str
    index: int
    sampled: Sampled
    text: str
    text_offset: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The turn takes part in no further step. `error` only when a step raised."""

    turn_id: str
    reason: FinishReason
    stop_hit: StopHit | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class CellSealed:
    """Cell `index` of a session became sealed; -1: its sealing is over, early if `error` says why."""

    owner: str
    index: int
    error: Exception | None = None

    @property
    def is_over(self) -> bool:
        return self.index < 0


@dataclass(frozen=True, slots=True)
class Scored:
    """The scoring of a session is over, early if `error` says why."""

    owner: str
    error: Exception | None = None
    is_over: bool = True


Event = TokenOut | Ended | CellSealed | Scored


def replay(turn_id: str, ids: Sequence[int], stream: TextStream, stop_ids: frozenset[int]) -> list[TokenOut]:
    """Tokens that were sampled before, with the text that came with each; logprobs are gone.

    A stop token shows nothing. It ended its turn, so only the last of `ids` can be one.
    """
    out = []
    for index, token in enumerate(ids):
        is_stop = index == len(ids) - 1 and token in stop_ids
        delta = stream.flush() if is_stop else stream.push(token)
        out.append(TokenOut(turn_id, index, Sampled(token), delta.text, delta.byte_offset))
    return out


class TurnWork:
    """A turn as the engine sees it: tokens to compute, then tokens to sample.

    `tokens`: all log tokens up to the end of the prompt. `logged`: tokens this turn generated before it was
    interrupted; they are fed one at a time, as when they were sampled, so that sampling goes on as if nothing happened.
    `known`: positions of the history whose KV had been computed before; computing them again is counted.
    `policy` decides which positions before `turn_start` its tokens attend to. What it computes then is provisional,
    unless prompts attend to everything. `reading` is told what its steps read.
    """

    def __init__(
        self,
        turn_id: str,
        cache: SessionCache,
        tokens: Sequence[int],
        logged: Sequence[int],
        *,
        cell_tokens: int,
        seal: bool,
        known: int,
        max_new: int,
        max_context: int,
        stop_ids: frozenset[int],
        sampler: Sampler,
        stream: TextStream,
        policy: Policy = FULL,
        turn_start: int = 0,
        reading: Reading | None = None,
    ) -> None:
        self.turn_id = turn_id
        self.reading = reading
        self.cache = cache
        self.tokens = tokens
        self.known = known
        self.max_new = max_new
        self.max_context = max_context
        self.stop_ids = stop_ids
        self.sampler = sampler
        self.stream = stream
        self.generated = len(logged)
        # A turn that has logged tokens had computed its prompt, and all of those tokens but the last.
        self.computed_before = len(tokens) + len(logged) - 1 if logged else known
        for token in logged:
            self.sampler.observe(token)
        self.replayed = replay(turn_id, logged, stream, stop_ids)
        # How the turn had ended already, if it was interrupted between its last token and its commit.
        self.ended_before: Ended | None = None
        if self.replayed:
            self.replayed[-1], self.ended_before = self._ending(self.replayed[-1])
        self._plan(list(logged), cell_tokens, seal, policy, turn_start)

    def _plan(self, logged: list[int], cell_tokens: int, seal: bool, policy: Policy, turn_start: int) -> None:
        """What to compute: the pieces of the prompt, then single tokens. The last one is always fed, for its logits.

        History that is missing comes first, in pieces of its own where the policy chooses for the prompt. Its last
        token is always missing, as an answer's last one is never fed; alone it goes with the prompt.
        """
        cache, n_prompt = self.cache, len(self.tokens)
        have = min(cache.length, n_prompt + len(logged) - 1)
        if have < cache.length:
            cache.truncate(have, cell_tokens)
        own = min(have, turn_start) if have >= turn_start - 1 else turn_start
        before = cache.selection
        if logged and before is not None and before.policy == policy and before.turn_start == turn_start - 1 <= have:
            own = before.turn_start
        cache.use(policy, own, again=bool(logged))
        if self.reading is not None:
            self.reading.begin(own)
        if cache.selection is not None:
            cache.selection.reading = self.reading
        canonical = max(cache.sealed, cache.borrowed)
        if policy.dense_prompt or own == 0:  # without a history there is nothing to choose
            self.pieces = deque(plan_prefill(canonical, have, n_prompt, cell_tokens, seal))
        else:
            history = plan_prefill(canonical, have, own, cell_tokens, seal)
            self.pieces = deque([*history, *plan_prefill(own, max(have, own), n_prompt, cell_tokens, False)])
        self.pending = deque(logged[max(0, have - n_prompt) :])

    def recomputed(self, start: int, end: int) -> int:
        """How many of the positions [start, end) had been computed before this work began."""
        return max(0, min(end, self.computed_before) - start)

    def before_piece(self, piece: Piece) -> None:
        if self.reading is not None:
            self.reading.piece(piece.start, piece.end)

    def before_token(self) -> None:
        if self.reading is not None:
            self.reading.token(self.cache.length)

    def after_piece(self, piece: Piece) -> None:
        if self.reading is not None:
            self.reading.piece_done()
        self.cache.length = piece.end
        if piece.canonical and piece.start == self.cache.sealed:
            self.cache.sealed = piece.end
        elif piece.canonical:  # behind KV that came with an archive: as good as that, and no better
            self.cache.borrowed = piece.end

    def accept(self, sampled: Sampled) -> tuple[list[Event], bool]:
        """Take a sampled token; returns the events and whether the turn is over."""
        token, index = sampled.token_id, self.generated
        self.generated += 1
        self.pending.append(token)
        delta = self.stream.flush() if token in self.stop_ids else self.stream.push(token)
        out, ended = self._ending(TokenOut(self.turn_id, index, sampled, delta.text, delta.byte_offset))
        return ([out, ended], True) if ended else ([out], False)

    def _ending(self, last: TokenOut) -> tuple[TokenOut, Ended | None]:
        """Whether the turn ends with its newest token, which then brings out the text that was held as well."""
        if last.sampled.token_id in self.stop_ids or self.stream.stopped:
            reason = FinishReason.STOP
        elif self.generated >= self.max_new:
            reason = FinishReason.LENGTH
        elif len(self.tokens) + self.generated >= self.max_context:
            reason = FinishReason.CONTEXT_FULL
        else:
            return last, None
        last = replace(last, text=last.text + self.stream.flush().text)  # may complete a stop string
        hit = self.stream.stopped
        return last, Ended(self.turn_id, FinishReason.STOP if hit else reason, hit)


@dataclass(slots=True)
class SealWork:
    """Cells [cache.sealed, upto) of a session to be computed canonically, one a step, when no turn wants the model."""

    owner: str
    cache: SessionCache
    tokens: Sequence[int]
    upto: int
    abandoned: int = 0  # tries at the next cell


@dataclass(slots=True)
class ScoreWork:
    """A session's history to be scored, one piece a step, when nothing else wants the model."""

    owner: str
    scoring: Scoring
    abandoned: int = 0  # tries at the next piece


@dataclass(slots=True)
class Counters:
    """Totals since start, in tokens or steps."""

    prefilled: int = 0  # positions computed in pieces, those computed again included
    recomputed: int = 0  # positions that turns computed again: made canonical, or lost with the memory that held them
    decoded: int = 0  # tokens sampled
    sealed: int = 0  # positions sealed behind the turns; those of canonical prefill pieces are not among them
    probed: int = 0  # tokens computed to score others
    steps: int = 0
    step_seconds: float = 0.0  # in steps and in handing over what came of them


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
