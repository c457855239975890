"""A conversation in which a method lives with its own answers: its KV is what it computed itself."""

from __future__ import annotations

from _dialogue import Conversation, Turn
from _replay import CELL, answered, between_turns
from torch import Tensor

from sessiond.cache import SessionCache
from sessiond.model import Feed, Model
from sessiond.policies.base import Policy


def live(model: Model, conversation: Conversation, policy: Policy) -> list[Tensor]:
    """Logits [len(answer), V] of each turn's gold answer; what enters history is the method's greedy one."""
    cache = model.new_cache()
    found = []
    for turn in conversation.turns:
        if turn.filler:
            cache.use(policy, cache.length)
            answered(model, cache, turn.filler, turn.filler[:1])
        cache.use(policy, cache.length)
        between_turns(model, cache)
        found.append(_turn(model, cache, turn))
    return found


def _turn(model: Model, cache: SessionCache, turn: Turn) -> Tensor:
    logits = answered(model, cache, turn.prompt, turn.reply)[len(turn.stem) :]
    told = cache.length - (len(turn.answer) - 1)
    token = int(logits[0].argmax())
    if logits.argmax(-1).tolist() != turn.answer:
        cache.truncate(told, CELL)
        for _ in turn.answer[1:]:
            token = int(_next(model, cache, token).argmax())
    else:
        token = turn.answer[-1]
    for last in (token, *turn.closing):
        _next(model, cache, last)
    return logits


def _next(model: Model, cache: SessionCache, token: int) -> Tensor:
    logits = model.step([Feed(cache, [token], cache.length, cache.selection, decoding=True)], [0])[0]
    cache.length += 1
    return logits
