"""What is being written just now and cannot yet be found from the log: the collector leaves it alone.

KV is durable in `blocks` before the reference to it is in `log`; in between it looks like garbage. Whoever writes it
holds its names here until the reference is durable. A death ends all holds, and leaves what is garbage indeed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator


class InFlight:
    """Names (keys or key prefixes of either environment) in use by writers. Thread-safe.

    A writer holds a name *before* it looks for the reference and until it has written it (or failed); so a collector
    that acts under the lock (`unless_used`) comes wholly before that look or wholly after that write.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: Counter[bytes] = Counter()
        self._watches: list[set[bytes]] = []

    @contextlib.contextmanager
    def hold(self, names: Iterable[bytes]) -> Iterator[None]:
        """Keep these names from being collected inside the block."""
        names = list(names)
        with self._lock:
            self._held.update(names)
            for watch in self._watches:
                watch.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._held.subtract(names)
                for name in names:
                    if self._held[name] <= 0:
                        del self._held[name]

    @contextlib.contextmanager
    def watch(self) -> Iterator[set[bytes]]:
        """The names held at any time inside the block: what a reader of the log decided before may be outdated."""
        with self._lock:
            seen = set(self._held)
            self._watches.append(seen)
        try:
            yield seen
        finally:
            with self._lock:
                self._watches = [other for other in self._watches if other is not seen]

    def unless_used(self, names: Iterable[bytes], seen: set[bytes], act: Callable[[list[bytes]], None]) -> None:
        """Call `act` with those names that nobody holds and that are not in `seen`; no hold begins meanwhile.

        `act` must be short: queue deletions, or wait for one small transaction.
        """
        with self._lock:
            free = [name for name in names if name not in self._held and name not in seen]
            if free:
                act(free)
