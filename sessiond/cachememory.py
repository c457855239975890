"""Memory for the sessions that become hot: small pages for a short one, huge ones, mapped ahead, for a long one.

Fresh memory costs more than what is read into it: 10 to 400 ms for 6,000 tokens of the default model.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from sessiond.backing import Backing, files_supported
from sessiond.cache import SessionCache, reserved_bytes
from sessiond.errors import DiskFull
from sessiond.storage.environment import DEFAULT_RESERVE_BYTES
from sessiond.storage.space import is_short
from sessiond.types import KVShape

log = structlog.get_logger()

# Offloaded KV takes no disk space below this: the store, which needs it to go on, is refused at its own reserve.
KEPT_FREE_BYTES = 8 * DEFAULT_RESERVE_BYTES
# Share of the capacity from which on a session counts as long: it gets memory in huge pages, for its whole capacity.
LONG = 3 / 8
REFILL_SECONDS = 1.0


class CacheMemory:
    """Makes caches of `capacity` positions, and keeps at most one long session's memory as a spare. Thread-safe.

    `pool` of `n_workers` threads maps pages in parallel. Files for offloaded KV are made in `folder`.
    """

    def __init__(self, shape: KVShape, capacity: int, pool: ThreadPoolExecutor, n_workers: int, folder: Path) -> None:
        self.shape = shape
        self.capacity = capacity
        self._folder = folder
        self._pool = pool
        self._workers = n_workers
        self._spare: SessionCache | None = None
        self._spare_allowed = False
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def map_spare(self, spare_bytes: int) -> None:
        """Map memory for one long session ahead, if it takes at most `spare_bytes`."""
        if self.shape.bytes_per_token * self.capacity <= spare_bytes:
            self._spare_allowed = True
            self._spare = self._map(self.capacity)

    def open_file(self) -> Backing | None:
        """A file for one session's exact KV; None, and a word in the log, if there cannot be one."""
        nbytes = reserved_bytes(self.shape, self.capacity)
        if not files_supported():
            return None
        if is_short(str(self._folder), nbytes + KEPT_FREE_BYTES):
            log.warning("no disk space to offload KV: it stays in memory", folder=str(self._folder), bytes=nbytes)
            return None
        try:
            return Backing(nbytes, self._folder)
        except (DiskFull, OSError) as error:
            log.warning("KV cannot be offloaded: it stays in memory", folder=str(self._folder), error=str(error))
            return None

    def take(self, length: int, backing: Backing | None = None) -> SessionCache:
        """Memory for a session of `length` tokens: a long one gets the spare, if it is there, and another is mapped.

        With a `backing`, that.
        """
        if backing is not None:
            return SessionCache(self.shape, self.capacity, backing)
        if not self.is_long(length):
            return SessionCache(self.shape, self.capacity)
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is None:
            return self._map(length)
        threading.Thread(target=self._refill, name="spare", daemon=True).start()
        return spare

    def is_long(self, length: int) -> bool:
        return length >= LONG * self.capacity

    def close(self) -> None:
        """Map no more spares, and drop the one that is there."""
        self._spare_allowed = False
        self._closed.set()
        with self._lock:
            self._spare = None

    def _refill(self) -> None:
        """Map a spare once the session that took the last one has its first token: it needs the cores now."""
        if self._closed.wait(REFILL_SECONDS):
            return
        spare = SessionCache(self.shape, self.capacity)
        spare.backing.use_huge_pages()
        for layer in range(self.shape.n_layers):  # in this thread, layer by layer: nobody waits for it
            if self._closed.is_set():
                return
            spare.populate(range(layer, layer + 1), self.capacity)
        with self._lock:
            if self._spare is None and self._spare_allowed:
                self._spare = spare

    def give_back(self, cache: SessionCache) -> None:
        """Keep a long session's memory as the spare, cleared, unless there is one. Nobody else may hold the cache."""
        with self._lock:
            wanted = self._spare is None and self._spare_allowed and cache.backing.is_huge
        if wanted:
            cache.clear()
            with self._lock:
                self._spare = cache

    def _map(self, length: int) -> SessionCache:
        cache = SessionCache(self.shape, self.capacity)
        cache.backing.use_huge_pages()
        n, parts = self.shape.n_layers, self._workers
        stripes = [range(n * i // parts, n * (i + 1) // parts) for i in range(parts)]
        list(self._pool.map(lambda layers: cache.populate(layers, length), stripes))
        return cache
