"""Work on a session's KV that waits while turns want the model: sealing its history, and scoring it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sessiond.cache import SessionCache
from sessiond.zipping import Scoring


@dataclass(slots=True)
class SealWork:
    """Cells [cache.sealed, upto) of a session to be computed canonically, one a step, when no turn wants the model."""

    owner: str
    cache: SessionCache
    tokens: Sequence[int]
    upto: int
    abandoned: int = 0  # tries at the next cell


@dataclass(slots=True)
class ScoreWork:
    """A session's history to be scored, one piece a step, when nothing else wants the model."""

    owner: str
    scoring: Scoring
    abandoned: int = 0  # tries at the next piece
