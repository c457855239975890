"""A branch of the token log, read whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sessiond.storage.log import LogStore
from sessiond.storage.records import RevisionRecord

Ids = np.ndarray[Any, np.dtype[np.uint32]]


def read_branch(log: LogStore, tenant: str, head: str) -> tuple[list[RevisionRecord], Ids]:
    """Revisions root..head and their joined token ids. Raises RevisionNotFound or RecordCorrupt."""
    chain = log.chain(tenant, head)
    parts = [log.tokens(tenant, r.revision_id, r.log_end - r.log_start)[0] for r in chain]
    return chain, np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def computed_upto(chain: Sequence[RevisionRecord]) -> int:
    """Positions of this branch whose KV has been computed at some time: less than the log by what was never fed."""
    return max((int(r.extra.get("computed", 0)) for r in chain), default=0)
