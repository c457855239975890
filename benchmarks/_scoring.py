"""KVzip's scores of a history that the policies share, computed between turns as the daemon does when it is idle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from sessiond.cache import SessionCache
from sessiond.model import Model
from sessiond.policies.base import Policy
from sessiond.policies.probing import Instruction
from sessiond.zipping import PART, WHOLE, score


def score_history(
    model: Model,
    cache: SessionCache,
    ids: Sequence[int],
    policies: Iterable[Policy],
    encode: Callable[[str], list[int]],
    reply: str = "\n\n",
) -> None:
    """Score what the cache holds of `ids` if one of `policies` wants it; `reply` stands between request and answer."""
    if not any(policy.wants_prior for policy in policies):
        return
    before, after = PART.split("{}")
    score(model, cache, ids, Instruction(encode(WHOLE + reply), encode(before), encode(after + reply)))
