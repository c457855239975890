"""What was promised, kept outside the store: a line before each step (intent) and one after its acknowledgement.

The file is opened O_APPEND and never truncated, so lines of a killed writer stay in order and whole but for the last.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path


class Oracle:
    """The writing end. One `write` a line: threads may share it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def intend(self, step: str, *what: int) -> None:
        self._write("i", step, *what)

    def acknowledge(self, step: str, *what: int) -> None:
        self._write("a", step, *what)

    def _write(self, *line: str | int) -> None:
        os.write(self._fd, json.dumps(line).encode() + b"\n")


@dataclass
class Turn:
    opened: bool = False  # acknowledged: prompt and request are logged
    tokens: int = 0  # generated tokens acknowledged
    may_tokens: int = 0  # generated tokens begun
    ended: str = ""  # "commit" or "discard", acknowledged
    may_end: str = ""  # begun


@dataclass
class Session:
    created: bool = False
    purged: bool = False
    may_be_purged: bool = False
    turns: dict[int, Turn] = field(default_factory=lambda: defaultdict(Turn))
    cells: set[int] = field(default_factory=set)  # indexes of sealed cells acknowledged
    tail: int = -1  # turn whose tail was acknowledged last
    may_tail: int = -1


@dataclass
class Promises:
    """Everything the oracle says, by session number."""

    sessions: dict[int, Session] = field(default_factory=lambda: defaultdict(Session))
    quota: int = 0  # the last one acknowledged
    may_quota: int = 0

    @property
    def n_acknowledged(self) -> int:
        """Steps acknowledged: a trial that proves something has some."""
        found = [s.created + len(s.cells) + sum(t.opened + t.tokens for t in s.turns.values()) for s in self._all()]
        return sum(found)

    def _all(self) -> list[Session]:
        return list(self.sessions.values())


def read_oracle(path: Path) -> Promises:
    promises = Promises()
    if not path.exists():
        return promises
    for line in path.read_text().split("\n")[:-1]:  # what follows the last newline is a line cut by the kill
        sign, step, *what = json.loads(line)
        _apply(promises, sign == "a", step, what)
    return promises


def _apply(promises: Promises, acknowledged: bool, step: str, what: list[int]) -> None:
    if step == "quota":
        promises.may_quota = what[0]
        promises.quota = what[0] if acknowledged else promises.quota
        return
    session = promises.sessions[what[0]]
    if step == "create":
        session.created |= acknowledged
    elif step == "purge":
        session.may_be_purged = True
        session.purged |= acknowledged
    elif step == "cell" and acknowledged:
        session.cells.add(what[1])
    elif step == "tail":
        session.may_tail = what[1]
        session.tail = what[1] if acknowledged else session.tail
    elif step in ("open", "token", "commit", "discard"):
        _apply_turn(session.turns[what[1]], acknowledged, step, what)


def _apply_turn(turn: Turn, acknowledged: bool, step: str, what: list[int]) -> None:
    if step == "open":
        turn.opened |= acknowledged
    elif step == "token":
        turn.may_tokens = max(turn.may_tokens, what[2] + 1)
        turn.tokens = max(turn.tokens, what[2] + 1) if acknowledged else turn.tokens
    else:
        turn.may_end = step
        turn.ended = step if acknowledged else turn.ended
