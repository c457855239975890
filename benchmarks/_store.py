"""The data directory of a stopped daemon, opened in this process: its longest session and that session's KV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import CellRef, RevisionRecord, SessionRecord, TailRef
from sessiond.storage.store import Store


@dataclass(frozen=True, slots=True)
class Stored:
    """A session as the log has it. `cells`: its leading sealed cells. `tail`: provisional KV after them, if any."""

    store: Store
    record: SessionRecord
    chain: list[RevisionRecord]
    ids: NDArray[np.uint32]
    cells: list[CellRef]
    tail: TailRef | None

    @property
    def sealed(self) -> int:
        return len(self.cells) * self.store.cell_tokens

    @property
    def persisted(self) -> int:
        """Tokens [0, persisted) have KV on disk."""
        return max(self.sealed, self.tail.start + self.tail.length if self.tail else 0)

    def prompt_and_answer(self) -> tuple[list[int], list[int]]:
        """Tokens of the last turn: what was asked, and what was generated."""
        last = self.chain[-1]
        middle = last.log_start + last.n_prompt
        return self.ids[last.log_start : middle].tolist(), self.ids[middle : last.log_end].tolist()


@contextmanager
def open_longest(data_dir: Path) -> Iterator[Stored]:
    """The session with the longest history. Raises RuntimeError if there is none; makes no directory."""
    if not (data_dir / "FORMAT").is_file():
        raise RuntimeError(f"{data_dir} is no data directory")
    with Store.open(data_dir) as store:
        found = [_read(store, record) for record in store.log.sessions()]
        if not found:
            raise RuntimeError(f"{data_dir} holds no session")
        yield max(found, key=lambda stored: len(stored.ids))


def _read(store: Store, record: SessionRecord) -> Stored:
    log, tenant = store.log, record.tenant
    chain = log.chain(tenant, record.head_revision)
    parts = [log.tokens(tenant, r.revision_id, r.log_end - r.log_start)[0] for r in chain]
    ids = np.concatenate(parts).astype(np.uint32)
    refs = log.cell_refs(tenant, prefix_hashes(tenant, record.identity_id, ids, store.cell_tokens))
    cells: list[CellRef] = []
    for ref in refs:
        if ref is None:
            break
        cells.append(ref)
    sealed = len(cells) * store.cell_tokens
    tails: list[Any] = [log.tail_ref(tenant, r.revision_id) for r in reversed(chain)]
    tail = next((t for t in tails if t and t.start <= sealed < t.start + t.length), None)
    return Stored(store, record, chain, ids, cells, tail)
