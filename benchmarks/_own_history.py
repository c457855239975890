"""A conversation in which a method lives with its own answers: its KV is what it computed itself."""

from __future__ import annotations

from _dialogue import Chat, Conversation, Turn
from _replay import CELL, answered, between_turns, raise_failure
from _scoring import score_history
from torch import Tensor

from sessiond.cache import SessionCache
from sessiond.model import Feed, Model
from sessiond.policies.base import Policy


def live(model: Model, chat: Chat, conversation: Conversation, policy: Policy) -> list[Tensor]:
    """Logits [len(answer), V] of each turn's gold answer; what enters history is the method's greedy one.

    Before each turn its history is scored if the policy wants it. Raises what the policy raises.
    """
    cache = model.new_cache()
    ids: list[int] = []  # what the cache holds
    found = []
    for turn in conversation.turns:
        if turn.filler:
            _begin(model, chat, cache, ids, policy)
            answered(model, cache, turn.filler, turn.filler[:1])
            ids += turn.filler
        _begin(model, chat, cache, ids, policy)
        logits, told = _turn(model, cache, turn)
        found.append(logits)
        ids += [*turn.prompt, *turn.stem, *told, *turn.closing]
    return found


def _begin(model: Model, chat: Chat, cache: SessionCache, ids: list[int], policy: Policy) -> None:
    if cache.length:
        score_history(model, cache, ids, [policy], chat.ids, chat.reply)
    cache.use(policy, cache.length)
    between_turns(model, cache)


def _turn(model: Model, cache: SessionCache, turn: Turn) -> tuple[Tensor, list[int]]:
    """The logits, and the answer that entered history."""
    logits = answered(model, cache, turn.prompt, turn.reply)[len(turn.stem) :]
    if logits.argmax(-1).tolist() == turn.answer:
        told = turn.answer
    else:
        cache.truncate(cache.length - (len(turn.answer) - 1), CELL)
        told = [int(logits[0].argmax())]
        for _ in turn.answer[1:]:
            told.append(int(_next(model, cache, told[-1]).argmax()))
    for last in (told[-1], *turn.closing):
        _next(model, cache, last)
    return logits, told


def _next(model: Model, cache: SessionCache, token: int) -> Tensor:
    logits = model.step([Feed(cache, [token], cache.length, cache.selection, decoding=True)], [0])[0]
    cache.length += 1
    raise_failure(cache)
    return logits
