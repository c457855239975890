"""Priors on disk: with every revision the scores of those tokens that were first scored when it was the head.

A view of the tokens: what is missing or damaged is scored again. Forks share it as they share the revision.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from sessiond.errors import RecordCorrupt
from sessiond.policies.prior import Prior
from sessiond.storage.batch import LogBatch
from sessiond.storage.records import RevisionRecord
from sessiond.storage.store import Store
from sessiond.types import KVShape

logger = structlog.get_logger()


def find_prior(
    store: Store, tenant: str, chain: Sequence[RevisionRecord], identity_id: str, shape: KVShape
) -> Prior | None:
    """The scores of a branch, root to leaf, up to the first gap; None if there are none."""
    found: Prior | None = None
    for revision in chain:
        try:
            record = store.log.prior(tenant, revision.revision_id)
            if record is None or record[0].get("identity_id") != identity_id:
                continue
            start, part = record[0].get("start"), Prior.from_bytes(record[1], shape.n_layers, shape.n_kv_heads)
        except (RecordCorrupt, ValueError) as error:
            logger.warning("scores are damaged", revision=revision.revision_id, error=str(error))
            continue
        n = found.n if found else 0
        if not isinstance(start, int) or not start <= n < start + part.n <= revision.position_end:
            continue
        new = part.scores[:, :, n - start :]
        found = found.followed_by(new) if found else Prior(new)
    return found


def store_prior(
    store: Store, tenant: str, chain: Sequence[RevisionRecord], identity_id: str, shape: KVShape, prior: Prior
) -> int:
    """Make durable what the records of a branch lack of `prior`, with its last revision. Returns bytes written.

    Raises RevisionNotFound if that revision is gone.
    """
    stored = find_prior(store, tenant, chain, identity_id, shape)
    if not chain or (stored is not None and stored.n >= prior.n):
        return 0
    before = find_prior(store, tenant, chain[:-1], identity_id, shape)
    start = before.n if before else 0
    data = Prior(prior.scores[:, :, start:]).to_bytes()
    batch = LogBatch()
    batch.put_prior(tenant, chain[-1].revision_id, {"identity_id": identity_id, "start": start}, data)
    store.log.write(batch).result()
    return len(data)
