"""What a run of one kind of fault came to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace


class Unavailable(Exception):  # noqa: N818 - reads as the errors of sessiond do
    """This machine lacks what the kind needs (FUSE, mounts, a C compiler); the message says what."""


@dataclass(frozen=True)
class Outcome:
    """`details` holds one line for each failure: what was wrong, where, and the seed that shows it again."""

    kind: str
    run: int = 0
    failed: int = 0
    lost_tokens: int = 0
    turns_twice: int = 0
    silent_corruptions: int = 0
    details: list[str] = field(default_factory=list)
    # One line for each limit of time that was passed: a failure in a column, only told beside other tests.
    late: list[str] = field(default_factory=list)
    # Figures worth printing that are no failures, such as how often damage ended the reading process.
    counts: dict[str, int] = field(default_factory=dict)
    skipped: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> Outcome:
        return Outcome(**json.loads(line))


def with_limits(outcome: Outcome) -> Outcome:
    """Limits of time that were passed count as failures."""
    late = outcome.late
    return replace(outcome, failed=outcome.failed + len(late), details=[*outcome.details, *late], late=[])


def total(kind: str, outcomes: Iterable[Outcome]) -> Outcome:
    """All runs of one kind as one."""
    parts = list(outcomes)
    counts: dict[str, int] = {}
    for part in parts:
        for name, n in part.counts.items():
            counts[name] = max(counts.get(name, 0), n) if name.startswith("slowest") else counts.get(name, 0) + n
    return Outcome(
        kind,
        run=sum(part.run for part in parts),
        failed=sum(part.failed for part in parts),
        lost_tokens=sum(part.lost_tokens for part in parts),
        turns_twice=sum(part.turns_twice for part in parts),
        silent_corruptions=sum(part.silent_corruptions for part in parts),
        details=[line for part in parts for line in part.details],
        late=[line for part in parts for line in part.late],
        counts=counts,
        skipped="; ".join(sorted({part.skipped for part in parts if part.skipped})),
    )
