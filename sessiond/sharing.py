"""Whose KV in memory may serve another session of the tenant, and how it is taken over.

Sealed cells serve whoever has the same tokens. Provisional KV is private to its revision: it serves only branches that
share that revision, which forks do.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sessiond.branch import Ids, computed_upto
from sessiond.live import Live
from sessiond.restoring import Donor
from sessiond.types import Span


def common_tokens(first: Ids, second: Ids) -> int:
    """How many leading tokens agree."""
    n = min(len(first), len(second))
    differing = np.flatnonzero(first[:n] != second[:n])
    return int(differing[0]) if len(differing) else n


def tokens_of(live: Live) -> Ids:
    """A hot session's tokens as far as they are settled: its history, and the prompt of a running turn."""
    if live.turn is None:
        return live.ids
    return np.concatenate([live.ids, np.array(live.turn.plan.prompt, np.uint32)])


def sealed_donor(lives: Iterable[Live], live: Live, tokens: Ids, cell_tokens: int) -> Donor | None:
    """The hot session of the same tenant that holds most leading cells of `tokens`, sealed; None if none holds any."""
    best = None
    for other in lives:
        cache = other.cache
        if other is live or other.tenant != live.tenant or cache is None:
            continue
        donor = Donor(cache, cache.epoch, cache.sealed)
        if donor.sealed < cell_tokens or (best and donor.sealed <= best.sealed) or len(tokens) < cell_tokens:
            continue
        theirs = tokens_of(other)
        if not np.array_equal(theirs[:cell_tokens], tokens[:cell_tokens]):
            continue
        sealed = min(donor.sealed, common_tokens(theirs, tokens) // cell_tokens * cell_tokens)
        if best is None or sealed > best.sealed:
            best = Donor(cache, donor.epoch, sealed)
    return best


def relative(lives: Iterable[Live], live: Live) -> tuple[Donor, int] | None:
    """The hot session that shares most revisions with this one, and how many positions these have."""
    own, computed = {revision.revision_id for revision in live.chain}, computed_upto(live.chain)
    best = None
    for other in lives:
        if other is live or other.tenant != live.tenant or other.cache is None or other.turn is not None:
            continue
        shared = min(max((r.position_end for r in other.chain if r.revision_id in own), default=0), computed)
        if shared and (best is None or shared > best[1]):
            best = Donor(other.cache, other.cache.epoch, other.cache.sealed), shared
    return best


def take_over(live: Live, donor: Donor, shared: int) -> int:
    """Copy provisional KV of shared revisions behind what this session holds; returns the positions gained.

    What the other's policy knows comes along, where this session's knows nothing yet. Runs on the engine thread,
    between two steps: no step changes what is copied.
    """
    cache = live.cache
    assert cache is not None
    span = Span(cache.length, max(cache.length, min(shared, donor.cache.length)))
    if not len(span) or not donor.is_whole:
        return 0
    for layer in range(cache.shape.n_layers):
        cache.copy_from(donor.cache, layer, span)
    if not donor.is_whole:
        return 0
    cache.length = span.end
    if cache.selection is None and donor.cache.selection is not None:
        cache.selection = donor.cache.selection.branch(span.end)
    if cache.prior is None and donor.cache.prior is not None:
        cache.prior = donor.cache.prior.before(span.end)
    return len(span)
