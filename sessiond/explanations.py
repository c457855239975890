"""What turns read, as it is told, and the memory of it: bounded, and gone with the process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sessiond.restoring import Restoration
from sessiond.types import Tier

MOST_OF_A_SESSION = 16  # turns
MOST_TURNS = 4096
MOST_BYTES = 64 << 20  # of all together, as estimated


@dataclass(frozen=True, slots=True)
class ViewRead:
    """Tokens and bytes read in one form, summed over a turn's steps."""

    view: str
    tier: Tier
    tokens: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class LayerRead:
    """What KV heads [head_start, head_start + n_heads) of a layer read.

    `available`, `attended` and `spans` [n, 2] (uint32: start, end) are of the last step; `mass` None: not measured.
    """

    layer: int
    head_start: int
    n_heads: int
    available: int
    attended: int
    mean_attended: float
    spans: np.ndarray[Any, np.dtype[np.uint32]]
    spans_cut: bool
    views: tuple[ViewRead, ...]
    mass: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """What one turn read. `read_share`: of ranges of `range_tokens` tokens, from the log's beginning."""

    revision_id: str
    request_id: str
    policy: str
    knobs: Mapping[str, Any]
    context_tokens: int
    n_steps: int
    reads: tuple[LayerRead, ...]
    restored: Restoration | None
    milliseconds: Mapping[str, float]
    notes: tuple[str, ...]
    began_us: int
    read_share: tuple[float, ...] = ()
    range_tokens: int = 0

    @property
    def nbytes(self) -> int:
        """About what it takes in memory."""
        reads = sum(400 + read.spans.nbytes + 100 * len(read.views) for read in self.reads)
        told = sum(len(note) for note in self.notes) + len(str(self.knobs)) + len(str(self.restored))
        return 2000 + reads + 32 * len(self.read_share) + told


class Explanations:
    """The last turns of the sessions that had turns lately: the oldest are forgotten. Used on the event loop."""

    def __init__(self) -> None:
        # Sessions in the order of their last turns, the turns of each oldest first.
        self._turns: dict[tuple[str, str], list[Explanation]] = {}
        self._n_turns = self._nbytes = 0

    def __len__(self) -> int:
        return self._n_turns

    def remember(self, tenant: str, session_id: str, turn: Explanation) -> None:
        """A turn has ended, or stands suspended; one that goes on replaces what was told of it before."""
        key = tenant, session_id
        turns = [one for one in self._turns.get(key, []) if one.request_id != turn.request_id]
        self.forget(tenant, session_id)
        self._put(key, [*turns, turn][-MOST_OF_A_SESSION:])
        while self._n_turns > MOST_TURNS or self._nbytes > MOST_BYTES:
            self._forget_oldest()

    def committed(self, tenant: str, session_id: str, request_id: str, revision_id: str) -> None:
        """A suspended turn became a revision as it stood."""
        for turn in self.last(tenant, session_id):
            if turn.request_id == request_id:
                self.remember(tenant, session_id, replace(turn, revision_id=revision_id))

    def last(self, tenant: str, session_id: str) -> list[Explanation]:
        """What is remembered of a session, newest first."""
        return self._turns.get((tenant, session_id), [])[::-1]

    def forget(self, tenant: str, session_id: str) -> None:
        for turn in self._turns.pop((tenant, session_id), []):
            self._n_turns -= 1
            self._nbytes -= turn.nbytes

    def _put(self, key: tuple[str, str], turns: list[Explanation]) -> None:
        self._turns[key] = turns
        self._n_turns += len(turns)
        self._nbytes += sum(turn.nbytes for turn in turns)

    def _forget_oldest(self) -> None:
        key, turns = next(iter(self._turns.items()))
        gone = turns.pop(0)
        self._n_turns -= 1
        self._nbytes -= gone.nbytes
        if not turns:
            del self._turns[key]
