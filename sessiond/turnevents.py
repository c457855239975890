"""What a turn tells the clients that listen to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sessiond.restoring import Restoration
from sessiond.sampling import Sampled
from sessiond.stepevents import TokenOut
from sessiond.types import FinishReason


@dataclass(frozen=True, slots=True)
class Accepted:
    """The turn is in the log. `new` prompt positions are computed by it, `reused` are not."""

    base_revision: str
    turn_revision: str
    new: int
    reused: int
    drift: bool
    attachment: str
    log_start: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Durable tokens `first_index`.. and the text they complete, at `text_offset` bytes of the answer."""

    first_index: int
    text_offset: int
    sampled: tuple[Sampled, ...]
    text: str

    @classmethod
    def of(cls, out: TokenOut) -> Tokens:
        return cls(out.index, out.text_offset, (out.sampled,), out.text)


@dataclass(frozen=True, slots=True)
class Finished:
    """The turn is a revision (or, aborted without commit, is not: `revision` is then empty)."""

    revision: str
    reason: FinishReason | None  # None: nothing was generated
    stop: str
    committed: int
    usage: dict[str, int]
    ttft_ms: float
    tokens_per_second: float
    answer: str
    memory: dict[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "reason": str(self.reason) if self.reason else None,
            "stop": self.stop,
            "committed": self.committed,
            "usage": self.usage,
            "ttft_ms": self.ttft_ms,
            "tokens_per_second": self.tokens_per_second,
            "answer": self.answer,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Finished:
        return cls(**{**value, "reason": FinishReason(value["reason"]) if value["reason"] else None})


# An aborted turn of which nothing was kept.
NOTHING = Finished("", FinishReason.ABORTED, "", 0, {}, 0.0, 0.0, "")

TurnEvent = Accepted | Restoration | Tokens | Finished
