"""Memory for the sessions that become hot: small pages for a short one, huge ones, mapped ahead, for a long one.

Fresh memory costs more than what is read into it: 10 to 400 ms for 6,000 tokens of the default model.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from sessiond.cache import SessionCache
from sessiond.types import KVShape


class CacheMemory:
    """Makes caches of `capacity` positions, and keeps at most one long session's memory as a spare. Thread-safe.

    `pool` of `n_workers` threads maps pages in parallel.
    """

    def __init__(self, shape: KVShape, capacity: int, pool: ThreadPoolExecutor, n_workers: int) -> None:
        self.shape = shape
        self.capacity = capacity
        self._pool = pool
        self._workers = n_workers
        self._spare: SessionCache | None = None
        self._spare_allowed = False
        self._lock = threading.Lock()

    def map_spare(self, spare_bytes: int) -> None:
        """Map memory for one long session ahead, if it takes at most `spare_bytes`."""
        if self.shape.bytes_per_token * self.capacity <= spare_bytes:
            self._spare_allowed = True
            self._spare = self._map(self.capacity)

    def take(self, length: int) -> SessionCache:
        """Memory for a session of `length` tokens: a long one gets the spare, if it is there."""
        if 2 * length < self.capacity:
            return SessionCache(self.shape, self.capacity)
        with self._lock:
            spare, self._spare = self._spare, None
        return spare or self._map(length)

    def give_back(self, cache: SessionCache) -> None:
        """Keep a long session's memory as the spare, cleared, unless there is one. Nobody else may hold the cache."""
        with self._lock:
            wanted = self._spare is None and self._spare_allowed and cache.is_huge
        if wanted:
            cache.clear()
            with self._lock:
                self._spare = cache

    def _map(self, length: int) -> SessionCache:
        cache = SessionCache(self.shape, self.capacity)
        cache.use_huge_pages(length)
        n, parts = self.shape.n_layers, self._workers
        stripes = [range(n * i // parts, n * (i + 1) // parts) for i in range(parts)]
        list(self._pool.map(lambda layers: cache.populate(layers, length), stripes))
        return cache
