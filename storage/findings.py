"""What a check of the store may find wrong."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sessiond.types import Span


class Severity(enum.IntEnum):
    """How bad a finding is."""

    NOTICE = 1  # space is wasted, or the index lags: nothing is lost
    REPAIRABLE = 2  # KV or an index entry is damaged or missing; the rest of the log rebuilds it
    LOSS = 3  # tokens, messages or records are lost


CHECKSUM = "checksum"
MISSING = "missing"
UNREFERENCED = "unreferenced"
RECOMPUTE_DIFFERS = "recompute_differs"
INDEX_LAGS = "index_lags"
INDEX_ONLY = "index_only"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `key` names a record of `log` or `blocks`; empty: a row of the SQL index."""

    severity: Severity
    kind: str
    tenant: str
    key: bytes
    message: str
    session_id: str = ""
    tokens: Span | None = None  # positions in the session's log
    repaired: bool = False
