"""What steps lead to: tokens, ends of turns, cells that became sealed; and how much was computed in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sessiond.sampling import Sampled
from sessiond.textstream import StopHit, TextStream
from sessiond.types import FinishReason


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


@dataclass(slots=True)
class Counters:
    """Totals since start, in tokens, steps or seconds."""

    prefilled: int = 0  # positions computed in pieces, those computed again included
    recomputed: int = 0  # positions that turns computed again: made canonical, or lost with the memory that held them
    decoded: int = 0  # tokens sampled
    sealed: int = 0  # positions sealed behind the turns; those of canonical prefill pieces are not among them
    probed: int = 0  # tokens computed to score others
    steps: int = 0
    step_seconds: float = 0.0  # in steps and in handing over what came of them
    forward_seconds: float = 0.0  # of these, in the layers of the model; packing a step is not among them


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
