"""Scoring a session's history: the model repeats it behind its end, and how it looks back at each token is captured.

    [0, kept)          always kept        [kept, prior.n)   scored before
    [prior.n, length)  scored now         [length, ...)     the probe's own; clean again when it has run

A chunk is scored whole or not at all, and what is scored counts at once: an interruption loses one chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from sessiond.cache import SessionCache
from sessiond.errors import BadMessage
from sessiond.forward import ForwardStep
from sessiond.model import Feed, Model
from sessiond.policies.prior import Prior, all_kept
from sessiond.policies.probing import CHUNK, Capture, Instruction, plan_probes
from sessiond.template import ChatTemplate, Message

WHOLE = "Repeat the previous context exactly."
PART = "Repeat the part of the previous context exactly, starting with {}"
SINKS = 4  # first tokens that are kept in any case: attention needs them as a sink
MOST_SYSTEM = 256  # a longer system prompt is a document: the rest of it is scored
_QUOTE = "\u2402\u2403"  # stands where the quoted tokens go


class Scoring:
    """One run over what a cache's prior lacks. Whoever owns the cache owns it, too.

    `ids`: the history, all that the cache holds or more of it. `n_system`: its first tokens, of the system prompt.
    `room`: positions behind the history that may be written. A step computes at most `piece` tokens.
    """

    def __init__(
        self,
        cache: SessionCache,
        ids: Sequence[int],
        instruction: Instruction,
        *,
        n_system: int,
        room: int,
        piece: int,
        chunk: int = CHUNK,
    ) -> None:
        assert cache.length <= len(ids)
        self.cache = cache
        self._piece = piece
        self._kept = max(SINKS, min(n_system, MOST_SYSTEM))
        first = cache.prior.n if cache.prior else self._kept
        history = ids[: cache.length]
        self._probes = deque(plan_probes(history, first, self._kept, room, instruction, chunk))
        self._done = 0  # tokens of the first probe that have run
        self._capture: Capture | None = None

    @property
    def is_over(self) -> bool:
        return not self._probes

    @property
    def reach(self) -> int:
        """Where the longest probe ends; the history's own end if there is none."""
        return max((one.position + len(one.token_ids) for one in self._probes), default=self.cache.length)

    def begin_piece(self, model: Model) -> ForwardStep:
        """The forward of the next piece; there must be one. `finish_piece` is called when it is over."""
        probe, cache = self._probes[0], self.cache
        if self._capture is None:
            self._clean()
            self._capture = Capture(probe, self._kept, cache.shape.n_layers, cache.shape.n_kv_heads)
        piece = probe.token_ids[self._done : self._done + self._piece]
        return model.begin([Feed(cache, piece, probe.position + self._done, capture=self._capture)], [])

    def finish_piece(self) -> int:
        """With a probe's last piece its chunk is scored. Returns the number of tokens computed."""
        probe, cache = self._probes[0], self.cache
        assert self._capture is not None
        n_tokens = min(self._piece, len(probe.token_ids) - self._done)
        self._done += n_tokens
        if self._done == len(probe.token_ids):
            before = cache.prior or all_kept(cache.shape.n_layers, cache.shape.n_kv_heads, self._kept)
            cache.prior = before.followed_by(self._capture.scores)
            self._probes.popleft()
            self.abandon()
        return n_tokens

    def abandon(self) -> None:
        """Leave nothing of a probe that has run in part."""
        if self._capture is not None:
            self._clean()
        self._capture, self._done = None, 0

    def _clean(self) -> None:
        self.cache.truncate(self.cache.length, self._piece)
        self.cache.trim()


def score(
    model: Model,
    cache: SessionCache,
    ids: Sequence[int],
    instruction: Instruction,
    *,
    n_system: int = 0,
    chunk: int = CHUNK,
    piece: int = 128,
) -> Prior | None:
    """Score what a cache holds of `ids`, as far as that was not done, without a daemon. Returns its prior."""
    room = min(cache.capacity, model.max_context) - cache.length
    scoring = Scoring(cache, ids, instruction, n_system=n_system, room=room, piece=piece, chunk=chunk)
    while not scoring.is_over:
        scoring.begin_piece(model).advance(lambda: False)
        scoring.finish_piece()
    return cache.prior


def instruction_for(template: ChatTemplate, encode: Callable[[str], list[int]], last_id: int | None) -> Instruction:
    """The request as a user's message behind a history that ends with the token `last_id`; plain without a template."""
    try:
        tail = template.open_tail("stop_token", last_id)

        def render(text: str) -> str:
            return template.render_turn((), [Message("user", text)], open_tail=tail, at_start=False).text

        whole, (before, _, after) = render(WHOLE), render(PART.format(_QUOTE)).partition(_QUOTE)
    except BadMessage:
        whole, (before, _, after) = f"\n\n{WHOLE}\n\n", f"\n\n{PART.format(_QUOTE)}\n\n".partition(_QUOTE)
    return Instruction(encode(whole), encode(before), encode(after))
