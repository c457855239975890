"""The tree pages of an LMDB 0.9 file, checked without LMDB before it is opened.

LMDB trusts them: a damaged one fails an assertion or is followed out of the file, and ends the process. So every branch
and leaf page is walked once, some microseconds each plus one for each record; pages of large values are not read.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

from sessiond import errors
from sessiond.storage.metapages import META, META_AT, Meta, newest_meta

_PAGE = struct.Struct("<QHHHH")  # number, unused, flags, end of the node table, start of the nodes
_NODE = struct.Struct("<HHHH")  # data size, or the child's page number with `flags` as its top; flags; key size
_NUMBER = struct.Struct("<Q")
_BRANCH, _LEAF = 1, 2
_BIG_DATA = 1
_NO_PAGE = (1 << 64) - 1


def check_structure(folder: str, hint: str = "") -> None:
    """Raises RecordCorrupt naming the first page that is no part of a sound tree, with `hint`; and OSError."""
    name = os.path.basename(folder)
    with open(os.path.join(folder, "data.mdb"), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < META_AT + META.size:
            raise errors.RecordCorrupt(f"{name}: the file is cut{hint}", key=name)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            try:
                meta = newest_meta(data)
                walk = _Walk(data, meta, set())
                for root, depth in meta.trees:
                    if root != _NO_PAGE:
                        walk.page(root, depth)
            except _UnsoundError as exc:
                raise errors.RecordCorrupt(f"{name}: {exc}{hint}", key=name) from exc


class _UnsoundError(Exception):
    pass


@dataclass
class _Walk:
    data: mmap.mmap
    meta: Meta
    seen: set[int]

    def page(self, number: int, depth: int) -> None:
        """Check a page that stands `depth` levels above nothing, and what is below it."""
        size = self.meta.page_bytes
        self._claim(number, 1)
        at = number * size
        said, _, flags, lower, upper = _PAGE.unpack_from(self.data, at)
        if said != number or flags != (_LEAF if depth == 1 else _BRANCH):
            raise _UnsoundError(f"page {number} is not the page that belongs there")
        n = (lower - _PAGE.size) // 2
        if not (_PAGE.size <= lower <= upper <= size) or lower % 2 or n < 1:
            raise _UnsoundError(f"page {number} has no sound table")
        for node in struct.unpack_from(f"<{n}H", self.data, at + _PAGE.size):
            if not upper <= node <= size - _NODE.size:
                raise _UnsoundError(f"page {number} has a node outside of it")
            self._node(number, at, node, depth)

    def _node(self, number: int, at: int, node: int, depth: int) -> None:
        low, high, flags, n_key = _NODE.unpack_from(self.data, at + node)
        end = node + _NODE.size + n_key
        if depth > 1:
            if end > self.meta.page_bytes:
                raise _UnsoundError(f"page {number} has a key that leaves it")
            self.page(low | high << 16 | flags << 32, depth - 1)
            return
        n_data = low | high << 16
        in_page = _NUMBER.size if flags & _BIG_DATA else n_data
        if flags & ~_BIG_DATA or end + in_page > self.meta.page_bytes:
            raise _UnsoundError(f"page {number} has a record that leaves it")
        if flags & _BIG_DATA:
            first = _NUMBER.unpack_from(self.data, at + end)[0]
            self._claim(first, -(-(n_data + _PAGE.size) // self.meta.page_bytes))

    def _claim(self, first: int, count: int) -> None:
        """Pages belong to one place each, and to the file."""
        if not 2 <= first <= first + count - 1 <= self.meta.last_page:
            raise _UnsoundError(f"page {first} is outside of the file")
        if (first + count) * self.meta.page_bytes > len(self.data):
            raise _UnsoundError(f"page {first} is beyond the end of the file")
        if first in self.seen:
            raise _UnsoundError(f"page {first} is used twice")
        self.seen.add(first)
