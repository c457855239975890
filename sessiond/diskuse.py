"""What is on disk, counted."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from sessiond.errors import RecordCorrupt
from sessiond.storage.store import Store

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class DiskTotals:
    """What is on disk, in bytes and records. `coded_pages` are KV records rounded to pages, `index` all other pages."""

    sessions: int
    deleted: int
    suspended: int
    raw: int
    coded: int
    coded_pages: int
    index: int
    log_file: int
    blocks_file: int


def disk_totals(store: Store) -> DiskTotals:
    """Walks all records of the log: for operators, not for a hot path. Leaves out what is damaged."""
    log = store.log
    sessions = deleted = suspended = raw = coded = 0
    for tenant in log.tenants():
        after: tuple[str, str] | None = None
        while page := log.sessions(tenant, after, on_corrupt=_left_out):
            after = (page[-1].tenant, page[-1].session_id)
            sessions += len(page)
            deleted += sum(record.deleted_us is not None for record in page)
            suspended += sum("open_request" in record.extra for record in page)
        cells, tails = log.all_cell_refs(tenant, _left_out), log.all_tail_refs(tenant, _left_out)
        raw += sum(ref.raw_bytes for ref in cells) + sum(ref.raw_bytes for ref in tails)
        coded += sum(ref.coded_bytes for ref in cells) + sum(ref.coded_bytes for ref in tails)
    log_stat, block_stat = log.stat(), store.blocks.stat()
    return DiskTotals(
        sessions=sessions,
        deleted=deleted,
        suspended=suspended,
        raw=raw,
        coded=coded,
        coded_pages=block_stat.overflow_bytes,
        index=block_stat.used_bytes - block_stat.overflow_bytes + log_stat.used_bytes,
        log_file=log_stat.file_bytes,
        blocks_file=block_stat.file_bytes,
    )


def _left_out(error: RecordCorrupt) -> None:
    logger.warning("damaged record not counted", error=error.message)
