"""The two meta pages of an LMDB 0.9 file, read without LMDB: they must name two transactions in a row.

Every commit writes the page that the one before did not. If one comes back as it was long ago, LMDB takes the other
one's older state for the newest. That one page write lost was the very last cannot be told from here: it is the
state as if that commit had not been made.
"""

from __future__ import annotations

import os
import struct

from sessiond import errors

_MAGIC = 0xBEEFC0DE
_PAGE_HEADER = 16
_META = struct.Struct("<IIQQI92xQQ")  # magic, version, address, map size, page size, both trees, last page, transaction


def check_meta_pages(folder: str) -> None:
    """Raises RecordCorrupt if they do not follow each other, and OSError."""
    with open(os.path.join(folder, "data.mdb"), "rb") as file:
        first = _read(file.read(_PAGE_HEADER + _META.size))
        file.seek(first[4] + _PAGE_HEADER)
        second = _META.unpack(file.read(_META.size))
    if second[0] != _MAGIC or abs(first[-1] - second[-1]) > 1:
        why = f"its meta pages are of transactions {first[-1]} and {second[-1]}: one of them is stale"
        raise errors.RecordCorrupt(f"{os.path.basename(folder)}: {why}", key=os.path.basename(folder), why=why)


def _read(raw: bytes) -> tuple[int, ...]:
    meta = _META.unpack(raw[_PAGE_HEADER:])
    if meta[0] != _MAGIC or not 512 <= meta[4] <= 65536:
        raise errors.RecordCorrupt("the first meta page is damaged", key="meta")
    return meta
