"""The conversation that is measured, and turns as a client sees and times them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from sessiond.clients import Session
from sessiond.v1 import sessions_pb2

SYSTEM = "You answer questions about a document briefly."
FIRST_QUESTION = "In one sentence, what is this document about?"
SECOND_QUESTION = "Which method removes spaces from both ends of a string?"
THIRD_QUESTION = "And which method splits a string into lines?"
DOCUMENT_TOKENS = 6000
SETTLE_LIMIT_S = 180.0

# Whole topics, in this order; the others follow by name.
_FIRST_TOPICS = ("string-methods", "typesseq", "formatstrings", "types")


@dataclass(slots=True)
class Turn:
    """One turn by the client's clock. `arrivals`: seconds since sending, and tokens received by then."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    accepted: sessions_pb2.Accepted = field(default_factory=sessions_pb2.Accepted)
    restored: sessions_pb2.Restored | None = None

    @property
    def ttft_ms(self) -> float:
        """From sending Generate to the first token."""
        return self.arrivals[0][0] * 1e3

    @property
    def token_ms(self) -> float:
        """Mean time of a token after the first."""
        return token_ms(self.arrivals)

    @property
    def reused(self) -> int:
        return int(self.accepted.prompt_tokens_reused)

    @property
    def computed(self) -> int:
        return int(self.accepted.prompt_tokens_new)

    @property
    def recomputed(self) -> int:
        return int(self.restored.tokens_recomputed) if self.restored else 0


def token_ms(arrivals: list[tuple[float, int]]) -> float:
    """Milliseconds a token between the first arrival and the last. Raises ValueError if there was but one."""
    (first_at, first_n), (last_at, last_n) = arrivals[0], arrivals[-1]
    if last_n == first_n:
        raise ValueError("the turn ended with its first token: there is no time between tokens")
    return (last_at - first_at) * 1e3 / (last_n - first_n)


def run_turn(session: Session, messages: Any = None, **options: Any) -> Turn:
    """Run one greedy turn to its end. Raises RuntimeError if it generated nothing."""
    turn = Turn()
    began = time.perf_counter()
    for event in session.generate(messages, **options):
        now = time.perf_counter() - began
        if event.kind == "accepted":
            turn.accepted = event.proto.accepted
        elif event.kind == "restored":
            turn.restored = event.proto.restored
        elif event.kind == "token":
            turn.text += event.text
            if event.token_ids:
                turn.token_ids += event.token_ids
                turn.arrivals.append((now, len(turn.token_ids)))
    if not turn.token_ids:
        raise RuntimeError("the turn generated nothing")
    return turn


def settled(token_count: int, exact_upto: int, persisted_upto: int, cell_tokens: int) -> bool:
    """Whether all whole cells are sealed and all KV is on disk. An answer's last token has none: it was not fed."""
    return exact_upto >= token_count // cell_tokens * cell_tokens and persisted_upto >= token_count - 1


def wait_settled(session: Session, cell_tokens: int) -> None:
    """Return once GetSession says that the session's KV is sealed and on disk. Raises RuntimeError after a while."""
    deadline = time.perf_counter() + SETTLE_LIMIT_S
    while time.perf_counter() < deadline:
        proto = session.refresh().proto
        idle = not proto.running_request_id
        if idle and settled(proto.token_count, proto.exact_upto, proto.persisted_upto, cell_tokens):
            return
        time.sleep(0.02)
    raise RuntimeError(
        f"after {SETTLE_LIMIT_S:.0f} s only {proto.persisted_upto} of {proto.token_count} tokens have KV on disk"
    )


def prose() -> str:
    """CPython's help text, in an order that does not depend on how it is stored."""
    from pydoc_data.topics import topics

    names = [name for name in _FIRST_TOPICS if name in topics]
    names += sorted(topics.keys() - set(names))
    return "\n\n".join(topics[name] for name in names)


def document(session: Session, n_tokens: int = DOCUMENT_TOKENS) -> tuple[str, int]:
    """As many whole paragraphs of `prose` as make at most `n_tokens`, counted by the daemon. (text, tokens)"""
    paragraphs = prose().split("\n\n")
    low, high, n_low = 0, len(paragraphs), 0
    while high - low > 1:
        middle = (low + high) // 2
        n_middle = count_tokens(session, "\n\n".join(paragraphs[:middle]))
        low, high, n_low = (middle, high, n_middle) if n_middle <= n_tokens else (low, middle, n_low)
    return "\n\n".join(paragraphs[:low]), n_low


def count_tokens(session: Session, text: str) -> int:
    """Tokens of `text` as a message of the user."""
    return int(session.count_tokens(text).tokens)
