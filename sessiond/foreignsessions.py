"""Sessions of a data directory that were made under another model than the one served now."""

from __future__ import annotations

from collections import Counter

from sessiond.errors import RecordCorrupt
from sessiond.modelidentity import differing_fields
from sessiond.storage.log import LogStore

_PAGE = 1000


def foreign_sessions(log: LogStore, identity_id: str) -> list[tuple[str, int, list[str]]]:
    """Each other identity that sessions belong to: its id, how many they are, and its fields that differ from ours.

    Reads no session where no other identity was ever registered. Damaged records are left out.
    """
    if set(log.identities()) <= {identity_id}:
        return []
    counts: Counter[str] = Counter()
    after: tuple[str, str] | None = None
    while page := log.sessions(after=after, limit=_PAGE, on_corrupt=_skip):
        counts.update(record.identity_id for record in page)
        after = page[-1].tenant, page[-1].session_id
    ours = log.identity(identity_id) or {}
    counts.pop(identity_id, None)
    return [(other, n, differing_fields(log.identity(other) or {}, ours)) for other, n in counts.most_common()]


def _skip(error: RecordCorrupt) -> None:
    """Told when the store was opened."""
