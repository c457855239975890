"""Conversations that tell facts and later ask for them, each once, and what a session under a policy answers.

The first turn tells most facts, every later one some more, and each ends by asking one. In later turns that is a fact
of an earlier turn, drawn evenly from those not asked yet. All is drawn before anything runs, and nothing of a question
is known before its turn: what a policy gave up until then, it gave up blindly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _recall_model import BEGIN, N_VALUES, Recipe, facts

from sessiond.cache import SessionCache
from sessiond.model import Feed, Model
from sessiond.policies.base import Policy, Taken
from sessiond.policies.prior import Prior
from sessiond.selection import Selection
from sessiond.types import Span

CELL = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a conversation: how many facts the first turn tells, and each later one."""

    turns: int = 12
    first: int = 768
    later: int = 16

    @property
    def n_facts(self) -> int:
        return self.first + (self.turns - 1) * self.later

    @property
    def history(self) -> int:
        """Tokens before the second turn: the fewest that a policy chooses from."""
        return 1 + (self.first + 1) * (1 + N_VALUES)

    @property
    def n_tokens(self) -> int:
        """Tokens of the whole conversation."""
        return 1 + (self.n_facts + self.turns) * (1 + N_VALUES)


@dataclass(frozen=True, slots=True)
class Turn:
    """`prompt` ends with the key that is asked, `answer` are its values; turn `told` (from 0) had told them."""

    prompt: list[int]
    answer: list[int]
    told: int


def conversation(recipe: Recipe, shape: Shape, seed: int) -> list[Turn]:
    """The same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    pool = iter(facts(recipe, 1, shape.n_facts, draw)[0].tolist())
    waiting: list[tuple[int, list[int]]] = []  # not asked yet, with the turn that told them
    turns = []
    for number in range(shape.turns):
        new = list(itertools.islice(pool, shape.later if number else shape.first))
        told_now = [(number, fact) for fact in new]
        among = waiting if number else told_now
        told, (key, *values) = among.pop(int(torch.randint(len(among), (1,), generator=draw)))
        prompt = [*([] if number else [BEGIN]), *itertools.chain.from_iterable(new), key]
        turns.append(Turn(prompt, values, told))
        waiting += told_now
    return turns


@dataclass
class Heard:
    """Of one conversation: the answers by turn, which were right, the share of history attended to by layer and step,
    and the bytes of what the policy kept at the end, for each token."""

    answers: list[list[int]] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    attended: list[float] = field(default_factory=list)
    index_bytes: float = 0.0


# What scores a history, all of whose token ids it is given: what a daemon does between turns for policies that want it.
ScoreHistory = Callable[[Model, SessionCache, Sequence[int]], Prior | None]


def converse(
    model: Model,
    policy: Policy,
    turns: Sequence[Turn],
    cache: SessionCache,
    reference: SessionCache | None = None,
    score: ScoreHistory | None = None,
) -> Heard:
    """Run a conversation from its beginning in `cache`; greedy answers.

    `reference` holds the KV of the conversation with the right answers, by full attention: these go into history,
    whatever was answered. It may be `cache` itself, which then comes to hold that. None: what was answered is history.
    In both cases a turn's KV is computed again with full attention when it is over, as a daemon does in idle time, and
    then `score` gives the cache its prior.
    Raises what a failing policy raised.
    """
    cache.truncate(0, CELL)
    cache.selection = None if policy.name == "full" else Watched(policy, cache.shape.n_layers)
    heard, history = Heard(), list[int]()
    for turn in turns:
        start, said = cache.length, list(turn.prompt)
        cache.use(policy, start)
        answer = []
        best = _step(model, cache, turn.prompt, decoding=False)
        for right in turn.answer:
            answer.append(best)
            said.append(best if reference is None else right)
            best = _step(model, cache, said[-1:], decoding=True)
        heard.answers.append(answer)
        heard.right.append(answer == turn.answer)
        _settle(model, cache, start, said, reference)
        history += said
        if score is not None:
            cache.prior = score(model, cache, history)
    if isinstance(cache.selection, Watched):
        heard.attended, heard.index_bytes = cache.selection.attended, cache.selection.nbytes / cache.length
    return heard


def _step(model: Model, cache: SessionCache, ids: Sequence[int], *, decoding: bool) -> int:
    """The most likely next token after these."""
    feed = Feed(cache, ids, cache.length, cache.selection, decoding=decoding)
    best = int(model.step([feed], [len(ids) - 1])[0].argmax())
    cache.length += len(ids)
    return best


def _settle(model: Model, cache: SessionCache, start: int, ids: list[int], reference: SessionCache | None) -> None:
    """The turn from `start` on is over: its KV becomes that of full attention, and the policy may catch up."""
    selection = cache.selection
    if selection is None:
        return
    if selection.failure is not None:
        raise selection.failure
    if reference is None:
        model.step([Feed(cache, ids, start)], [])
    else:
        cache.about_to_change(start)
        for layer in range(cache.shape.n_layers):
            cache.copy_from(reference, layer, Span(start, cache.length))
    for layer in range(cache.shape.n_layers):
        selection.rest(layer, cache.keys[layer], cache.values[layer], cache.length, model.rope)


class Watched(Selection):
    """Notes the share of history that decoded tokens attend to."""

    def __init__(self, policy: Policy, n_layers: int) -> None:
        super().__init__(policy, n_layers)
        self.attended: list[float] = []

    def choose(self, *args: Any, decoding: bool) -> Taken | None:
        chosen = super().choose(*args, decoding=decoding)
        if decoding and self.turn_start:
            taken = self.turn_start if chosen is None else float((chosen.positions >= 0).sum(-1).float().mean())
            self.attended.append(taken / self.turn_start)
        return chosen
