"""A turn as the engine sees it: pieces of its prompt to compute, then tokens to sample.

A prefill is cut into pieces (`plan_prefill`). Where at least a whole cell is new, cells are computed canonically: each
in a forward of its own, on top of sealed cells only, so that its KV is sealed at once. A short input is computed as it
is, provisionally, and sealed later off the token path.

    [0, sealed)                canonical
    [sealed, length)           provisional; recomputed by the first canonical piece that covers it
    [length, len(tokens))      to be computed by this turn
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sessiond.cache import SessionCache
from sessiond.policies.base import Policy
from sessiond.policies.full import Full
from sessiond.reading import Reading
from sessiond.sampling import Sampled, Sampler
from sessiond.stepevents import Ended, Event, TokenOut, replay
from sessiond.textstream import TextStream
from sessiond.types import FinishReason

FULL = Full()


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


class TurnWork:
    """A turn as the engine sees it: tokens to compute, then tokens to sample.

    `tokens`: all log tokens up to the end of the prompt. `logged`: tokens this turn generated before it was
    interrupted; they are fed one at a time, as when they were sampled, so that sampling goes on as if nothing happened.
    `known`: positions of the history whose KV had been computed before; computing them again is counted.
    `policy` decides which positions before `turn_start` its tokens attend to. What it computes then is provisional,
    unless prompts attend to everything. `reading` is told what its steps read.
    `tenant` and `priority` decide when its pieces are computed (line.py).
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
        tenant: str = "",
        priority: int = 0,
    ) -> None:
        self.turn_id = turn_id
        self.tenant = tenant
        self.priority = priority
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
