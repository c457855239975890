"""What a damaged token log still gives: said with the error, so that a person knows what is lost."""

from __future__ import annotations

from sessiond.errors import RecordCorrupt, RevisionNotFound, SessionNotFound
from sessiond.storage import keys
from sessiond.storage.log import LogStore


def described(log: LogStore, tenant: str, session_id: str, error: RecordCorrupt) -> RecordCorrupt:
    """The error with `session`, `readable` and `repairable` in its metadata.

    `readable`: ranges of log offsets "first-end,..." of the head's branch whose tokens can be read, end excluded; of
    all of the session's revisions where its head is not known. Nothing repairs a token log, so `repairable` is false:
    damaged KV is computed again and comes here only where the store itself is damaged.
    """
    spans = ",".join(f"{start}-{end}" for start, end in readable(log, tenant, session_id))
    told = RecordCorrupt(error.message, session=session_id, readable=spans, repairable="false")
    told.metadata |= error.metadata
    return told


def readable(log: LogStore, tenant: str, session_id: str) -> list[tuple[int, int]]:
    """Ranges of log offsets whose tokens can be read, in order; those that touch are joined."""
    spans = sorted({span for name in _revisions(log, tenant, session_id) if (span := _span(log, tenant, name))})
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _revisions(log: LogStore, tenant: str, session_id: str) -> list[str]:
    """The head's branch as far as it can be followed; then the session's others, if it breaks off before its root."""
    at: str | None
    found: list[str] = []
    try:
        at = log.session(tenant, session_id).head_revision
        while at is not None and at not in found:
            found.append(at)
            at = log.revision(tenant, at).parent
    except (RecordCorrupt, RevisionNotFound, SessionNotFound):
        found += log.ids(tenant, keys.REVISION_INDEX, session_id)
    return found


def _span(log: LogStore, tenant: str, revision_id: str) -> tuple[int, int] | None:
    """The log offsets of a revision's tokens; None if they cannot be read, or if there are none."""
    try:
        revision = log.revision(tenant, revision_id)
        log.tokens(tenant, revision_id, revision.log_end - revision.log_start)
    except (RecordCorrupt, RevisionNotFound):
        return None
    return (revision.log_start, revision.log_end) if revision.log_end > revision.log_start else None
