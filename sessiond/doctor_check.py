"""A finding of `sessiond doctor`."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Verdict(enum.StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `mend` says what to do; empty if all is well."""

    name: str
    verdict: Verdict
    found: str
    mend: str = ""


def show_bytes(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.1f} GiB"
