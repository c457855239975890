"""Computing a sample of sealed cells again, and comparing them bit by bit with what is stored.

Equal tokens under one identity and numerics profile must give equal bytes. A checksum cannot tell whether the bytes
that were stored were right; this can.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial

import numpy as np
import structlog
from blake3 import blake3

from sessiond.branch import Ids
from sessiond.cache import SessionCache
from sessiond.desk import Desk
from sessiond.errors import MemoryBudget, RecordCorrupt, SessiondError
from sessiond.reachability import branches
from sessiond.references import cell_refs
from sessiond.restoring import into
from sessiond.storage import keys
from sessiond.storage.blocks import Destination
from sessiond.storage.findings import RECOMPUTE_DIFFERS, Finding, Severity
from sessiond.storage.kv import KVOwner
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import CellRef
from sessiond.storage.rows import SessionKey
from sessiond.types import Part, Span

log = structlog.get_logger()

WAIT_SECONDS = 0.5
_OWNER = "\0audit"  # no session's: tenants and ids have no NUL


class Audit:
    """One run over some sessions. On the event loop; reads in pools, and computes when no turn wants the model.

    `share` of the cells are drawn by `seed` and the cells' own names, so that a run can be repeated.
    """

    def __init__(self, desk: Desk, share: float, seed: int) -> None:
        self.desk = desk
        self.cells_recomputed = 0
        self.cells_other_profile = 0
        self._limit = int(share * 2**64)
        self._seed = seed.to_bytes(8, "little")
        self._seen: set[tuple[str, bytes]] = set()
        self._n = desk.store.cell_tokens

    async def run(self, sessions: Sequence[SessionKey]) -> AsyncGenerator[Finding]:
        """Findings of cells that differ. Sessions of other models are passed over: nobody here can compute theirs."""
        desk = self.desk
        for tenant, session_id in sessions:
            for ids in await desk.in_pool(branches, desk.store, tenant, session_id, desk.identity_id):
                async for finding in self._branch(tenant, session_id, ids):
                    yield finding

    def _is_drawn(self, prefix_hash: bytes) -> bool:
        return int.from_bytes(blake3(self._seed + prefix_hash).digest(8), "little") < self._limit

    async def _branch(self, tenant: str, session_id: str, ids: Ids) -> AsyncGenerator[Finding]:
        desk = self.desk
        hashes = prefix_hashes(tenant, desk.identity_id, ids, self._n)
        refs, _ = await desk.in_pool(partial(cell_refs, forget=False), desk.store, tenant, hashes)
        drawn = [cell for cell in range(len(hashes)) if self._is_chosen(tenant, hashes[cell], refs[cell])]
        if not drawn:
            return
        n_bytes = (drawn[-1] + 1) * self._n * desk.tiers.shape.bytes_per_token
        if n_bytes > desk.settings.memory_budget_bytes:  # nor could the session run here
            log.warning("branch too long to compute again", session=session_id, needed_bytes=n_bytes)
            return
        async with self._room(n_bytes):
            cache = SessionCache(desk.tiers.shape, desk.tiers.capacity)
            for cell in drawn:
                await desk.in_pool(self._load, cache, tenant, hashes[:cell])
                await desk.seal_cells(_OWNER, cache, ids.tolist(), (cell + 1) * self._n)
                if cache.sealed < (cell + 1) * self._n:
                    raise SessiondError(f"cell {cell} of session {session_id} could not be computed again")
                differs = await desk.in_pool(self._differs, cache, KVOwner(tenant, "cell", hashes[cell]), cell)
                self.cells_recomputed += differs is not None
                if differs:
                    span = Span(cell * self._n, (cell + 1) * self._n)
                    key = keys.cell_ref_key(tenant, hashes[cell])
                    message = f"computed again, {differs} differs from what is stored"
                    yield Finding(Severity.REPAIRABLE, RECOMPUTE_DIFFERS, tenant, key, message, session_id, span)

    def _is_chosen(self, tenant: str, prefix_hash: bytes, ref: CellRef | None) -> bool:
        if ref is None or (tenant, prefix_hash) in self._seen or not self._is_drawn(prefix_hash):
            return False
        self._seen.add((tenant, prefix_hash))
        if ref.profile_id == self.desk.tiers.profile_id:
            return True
        self.cells_other_profile += 1  # other kernels, threads or libraries: bits may differ rightly
        return False

    @contextlib.asynccontextmanager
    async def _room(self, n_bytes: int) -> AsyncIterator[None]:
        """Memory beside the sessions', within the budget. Turns go first: it waits until they leave enough."""
        while True:
            try:
                await self.desk.set_aside(n_bytes)
                break
            except MemoryBudget:
                await asyncio.sleep(WAIT_SECONDS)
        try:
            yield
        finally:
            self.desk.aside_bytes -= n_bytes

    def _load(self, cache: SessionCache, tenant: str, hashes: Sequence[bytes]) -> None:
        """Bring what is stored of the cells before; from the first that is missing or damaged on they are computed."""
        for cell in range(cache.sealed // self._n, len(hashes)):
            start = cell * self._n
            span = Span(start, start + self._n)
            try:
                self._read(KVOwner(tenant, "cell", hashes[cell]), span, into(cache, span))
            except RecordCorrupt:
                return
            cache.sealed = cache.length = span.end

    def _differs(self, cache: SessionCache, owner: KVOwner, cell: int) -> str | None:
        """Which part of the stored cell differs from the one just computed, empty: none; None: it cannot be read."""
        span = Span(cell * self._n, (cell + 1) * self._n)
        parts = [(layer, part) for layer in range(cache.shape.n_layers) for part in (Part.K, Part.V)]
        stored = {(layer, part): cache.array(layer, int(part), span).copy() for layer, part in parts}
        try:
            self._read(owner, span, lambda layer, part: stored[layer, part])
        except RecordCorrupt:
            return None  # the scan's finding
        for (layer, part), array in stored.items():
            if not np.array_equal(array, cache.array(layer, int(part), span)):
                return f"{part.name} of layer {layer}"
        return ""

    def _read(self, owner: KVOwner, span: Span, out: Destination) -> None:
        self.desk.store.blocks.read_into(owner, span.start, len(span), self.desk.tiers.shape.n_layers, out)
