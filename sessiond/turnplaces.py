"""Places for turns that run or wait, and how long it takes until one is free."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sessiond.errors import QueueFull

# Each turn that ends counts for so much in the mean of how long turns take.
WEIGHT = 1 / 8
UNKNOWN_SECONDS = 1.0  # told before any turn has ended
LEAST_SECONDS, MOST_SECONDS = 0.05, 60.0


@dataclass(slots=True, eq=False)
class Place:
    """Of one turn, from its coming to its end."""

    taken_at: float = field(default_factory=time.monotonic)


class TurnPlaces:
    """Owned by the event loop. `most`: turns at a time; of those with a priority below 0 only three quarters of it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: set[Place] = set()
        self._seconds = 0.0  # a turn holds its place, in the mean; 0: not known yet
        self._told = 0  # refusals since the last place became free

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, priority: int) -> Place:
        """Raises QueueFull."""
        most = self._most if priority >= 0 else max(1, self._most - self._most // 4)
        if len(self._taken) >= most:
            self._told += 1
            told = f"{len(self._taken)} turns run or wait"
            raise QueueFull(told, retry_after=self.until_free(self._told), turns=most)
        place = Place()
        self._taken.add(place)
        return place

    def give_back(self, place: Place, *, ran: bool) -> None:
        """`ran`: its turn began and is over, so that it tells how long turns take."""
        self._taken.remove(place)
        self._told = 0
        if ran:
            held = time.monotonic() - place.taken_at
            self._seconds += WEIGHT * (held - self._seconds) if self._seconds else held

    def until_free(self, places: int = 1) -> float:
        """Seconds until so many of the turns that hold places now have ended, and given their memory back.

        By Little's law: where `n` turns each hold a place for `W` seconds, one becomes free every `W / n`. Who is
        refused is told the time after those refused before, so that not all come back at once.
        """
        if not self._seconds:
            return UNKNOWN_SECONDS
        return min(max(places * self._seconds / max(1, len(self._taken)), LEAST_SECONDS), MOST_SECONDS)
