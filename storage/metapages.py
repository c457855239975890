"""The two meta pages of an LMDB 0.9 file, read without LMDB: they must name two transactions in a row.

Every commit writes the page that the one before did not. If one comes back as it was long ago, LMDB takes the other
one's older state for the newest. That one page write lost was the very last cannot be told from here: it is the
state as if that commit had not been made.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap

from sessiond import errors

META_AT = 16  # behind the page's header
# magic, version, address, map size; page size, flags, depth, 4 counts, root of the free list; the same of the records;
# last page, transaction
META = struct.Struct("<IIQQ" + 2 * "IHHQQQQQ" + "QQ")
_MAGIC = 0xBEEFC0DE


@dataclass(frozen=True, slots=True)
class Meta:
    page_bytes: int
    trees: Sequence[tuple[int, int]]  # root page and depth: free list, records
    last_page: int
    transaction: int


def newest_meta(data: bytes | mmap) -> Meta:
    """The state that LMDB opens. Raises RecordCorrupt if a meta page is damaged or stale."""
    first = _parse(data, 0)
    second = _parse(data, first.page_bytes)
    if abs(first.transaction - second.transaction) > 1:
        why = f"meta pages are of transactions {first.transaction} and {second.transaction}: one of them is stale"
        raise errors.RecordCorrupt(why, key="meta", why=why)
    return max(first, second, key=lambda meta: meta.transaction)


def check_meta_pages(folder: str) -> None:
    """`newest_meta` of the file in `folder`; raises OSError too."""
    with open(os.path.join(folder, "data.mdb"), "rb") as file:
        newest_meta(file.read(2 << 16))


def _parse(data: bytes | mmap, page: int) -> Meta:
    if len(data) < page + META_AT + META.size:
        raise errors.RecordCorrupt("the file ends within its meta pages", key="meta")
    magic, _, _, _, page_bytes, _, free_depth, *rest = META.unpack_from(data, page + META_AT)
    free_root, (_, _, depth), root, last_page, transaction = rest[4], rest[5:8], rest[12], rest[13], rest[14]
    if magic != _MAGIC or not 512 <= page_bytes <= 65536:
        raise errors.RecordCorrupt("a meta page is damaged", key="meta")
    return Meta(page_bytes, ((free_root, free_depth), (root, depth)), last_page, transaction)
