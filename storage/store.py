"""The store: one data directory with its log, blocks and catalog."""

from __future__ import annotations

import os
from pathlib import Path

from sessiond import errors
from sessiond.storage.blocks import BlockStore
from sessiond.storage.catalog import Catalog, SessionKey
from sessiond.storage.directory import DirectoryLock, mark_tallied, read_or_create_format, sync_names
from sessiond.storage.environment import DEFAULT_RESERVE_BYTES, Environment, Tallied
from sessiond.storage.incoming import sweep
from sessiond.storage.inflight import InFlight
from sessiond.storage.log import LogStore

DEFAULT_LOG_MAP_BYTES = 64 << 30
DEFAULT_BLOCK_MAP_BYTES = 1 << 40


class Store:
    """An open data directory; owns its lock, two LMDB environments and the catalog.

    `lost` lists sessions that the catalog knows and the log does not, `damaged` the session records that
    do not verify: both found when opening, for the caller to report as DATA_LOSS. `inflight` names what is written
    and not yet referred to.
    """

    def __init__(
        self,
        root: Path,
        lock: DirectoryLock,
        log: LogStore,
        blocks: BlockStore,
        catalog: Catalog,
        cell_tokens: int,
        reserve_bytes: int = 0,
    ) -> None:
        self.root = root
        self.log = log
        self.blocks = blocks
        self.catalog = catalog
        self.cell_tokens = cell_tokens
        self.reserve_bytes = reserve_bytes
        self.inflight = InFlight()
        self.lost: list[SessionKey] = []
        self.damaged: list[errors.RecordCorrupt] = []
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        cell_tokens: int = 128,
        database_url: str | None = None,
        log_map_bytes: int = DEFAULT_LOG_MAP_BYTES,
        block_map_bytes: int = DEFAULT_BLOCK_MAP_BYTES,
        reserve_bytes: int = DEFAULT_RESERVE_BYTES,
        accept_damage: bool = False,
    ) -> Store:
        """Open or create a data directory, take its lock, migrate and reconcile the catalog.

        `cell_tokens` counts only when the directory is made; afterwards FORMAT decides. Map sizes are
        address space, not disk: sparse and fixed; lower them where the address space is limited.
        While less than `reserve_bytes` of disk are free, KV is not written and `require_space` raises; the log takes
        what was begun before down to half of that, then deletions only.
        A log whose records are not those that were committed (tally.py) is refused with RecordCorrupt; with
        `accept_damage` it is opened, what is wrong is told in `damaged`, and what there is counts from then on.
        Raises DataDirectoryBusy, DataDirectoryReadOnly, FormatTooNew, DiskFull, DependencyMissing,
        InvalidConfig, RecordCorrupt; then nothing stays open.
        """
        root = Path(path)
        lock = DirectoryLock(root)
        opened: list[LogStore | BlockStore | Catalog] = []
        try:
            form = read_or_create_format(root, cell_tokens)
            sweep(root)
            tallied: Tallied = "accept" if accept_damage else "yes" if form.tallied else "new"
            log_env = Environment(
                str(root / "log"), map_bytes=log_map_bytes, reserve_bytes=reserve_bytes // 2, tallied=tallied
            )
            log = LogStore(log_env)
            opened.append(log)
            if not form.tallied:
                mark_tallied(root, form)
            blocks = BlockStore(
                Environment(
                    str(root / "blocks"),
                    map_bytes=block_map_bytes,
                    reserve_bytes=reserve_bytes,
                    hint="; it may be moved away: KV is computed again from the log",
                )
            )
            opened.append(blocks)
            catalog = Catalog(path=root / "catalog.sqlite3") if database_url is None else Catalog(url=database_url)
            opened.append(catalog)
            sync_names(root)  # SQLite does not: without it a power loss may take the whole file
            store = cls(root, lock, log, blocks, catalog, form.cell_tokens, reserve_bytes)
            if log_env.damage:
                store.damaged.append(log_env.damage)
            store.lost = catalog.reconcile(log, store.damaged.append)
        except BaseException:
            for part in reversed(opened):
                part.close()
            lock.release()
            raise
        return store

    def free_bytes(self) -> int:
        """Free bytes on the data directory's file system."""
        fs = os.statvfs(self.root)
        return fs.f_bavail * fs.f_frsize

    @property
    def has_space(self) -> bool:
        """Whether the reserve is whole."""
        return self.free_bytes() >= self.reserve_bytes

    def require_space(self) -> None:
        """Raises DiskFull below the reserve: nothing new is begun then."""
        if not self.has_space:
            free = self.free_bytes()
            raise errors.DiskFull(
                f"{free} bytes of disk are free, fewer than the reserve of {self.reserve_bytes}",
                retry_after=10.0,
                free_bytes=free,
                reserve_bytes=self.reserve_bytes,
            )

    @property
    def read_only(self) -> bool:
        """True after a failed commit or fsync: no more writes until a restart."""
        return self.log.environment.read_only or self.blocks.environment.read_only

    def close(self) -> None:
        """Write what is queued, close everything, release the lock. Idempotent."""
        self.log.close()
        self.blocks.close()
        self.catalog.close()
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
