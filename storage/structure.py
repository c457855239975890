"""The tree pages of an LMDB 0.9 file, checked without LMDB before it is opened.

LMDB trusts them: a damaged one fails an assertion or is followed out of the file, and ends the process. So every branch
and leaf page is walked once, some microseconds each plus one for each record. Of a large value the header of its first
page is read: LMDB frees as many pages as that says. 3 us each when cached; from a cold disk the reads go side by side.
The list of free pages is read too: a page in use that it names would be written over by the next transaction.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, field

import numpy as np

from sessiond import errors
from sessiond.storage.metapages import META, META_AT, Meta, newest_meta

_PAGE = struct.Struct("<QHHHH")  # number, unused, flags, end of the node table, start of the nodes
_NODE = struct.Struct("<HHHH")  # data size, or the child's page number with `flags` as its top; flags; key size
_LARGE = struct.Struct("<Q2xHI")  # of a large value: number, flags, pages
_NUMBER = struct.Struct("<Q")
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_BIG_DATA = 1
_NO_PAGE = (1 << 64) - 1
_AT_ONCE = 64  # large values looked at together, so that a cold disk is read with that many requests under way


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
                walk = _Walk(file.fileno(), data, meta, bytearray(size // meta.page_bytes))
                for tree, (root, depth) in enumerate(meta.trees):
                    if root != _NO_PAGE:
                        walk.page(root, depth, lists_free=tree == 0)
                walk.check_large()
                walk.claim_free()
            except _UnsoundError as exc:
                raise errors.RecordCorrupt(f"{name}: {exc}{hint}", key=name) from exc


class _UnsoundError(Exception):
    pass


@dataclass
class _Walk:
    fd: int
    data: mmap.mmap
    meta: Meta
    taken: bytearray  # for each page of the file, whether it has its place
    large: list[tuple[int, int]] = field(default_factory=list)  # large values not looked at yet: first page, pages
    freed_by: int = 0  # the last transaction met that freed pages
    free: list[tuple[int, int]] = field(default_factory=list)  # where lists of free pages stand, and their bytes

    def page(self, number: int, depth: int, *, lists_free: bool = False) -> None:
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
            self._node(number, at, node, depth, lists_free=lists_free)
        if len(self.large) >= _AT_ONCE:
            self.check_large()

    def _node(self, number: int, at: int, node: int, depth: int, *, lists_free: bool) -> None:
        low, high, flags, n_key = _NODE.unpack_from(self.data, at + node)
        end = node + _NODE.size + n_key
        if depth > 1:
            if end > self.meta.page_bytes:
                raise _UnsoundError(f"page {number} has a key that leaves it")
            self.page(low | high << 16 | flags << 32, depth - 1, lists_free=lists_free)
            return
        n_data = low | high << 16
        in_page = _NUMBER.size if flags & _BIG_DATA else n_data
        if flags & ~_BIG_DATA or end + in_page > self.meta.page_bytes:
            raise _UnsoundError(f"page {number} has a record that leaves it")
        begin = at + end
        if flags & _BIG_DATA:
            first = _NUMBER.unpack_from(self.data, begin)[0]
            count = -(-(n_data + _PAGE.size) // self.meta.page_bytes)
            self._claim(first, count)
            self.large.append((first, count))
            begin = first * self.meta.page_bytes + _PAGE.size
        if lists_free:
            freed_by = _NUMBER.unpack_from(self.data, at + node + _NODE.size)[0] if n_key == _NUMBER.size else 0
            if not self.freed_by < freed_by <= self.meta.transaction:  # LMDB ends the process over one to come
                raise _UnsoundError(f"page {number} lists pages as freed by transaction {freed_by}")
            self.freed_by = freed_by
            self.free.append((begin, n_data))

    def check_large(self) -> None:
        """The large values met since the last call say the number and the count of their pages."""
        size = self.meta.page_bytes
        for first, _ in self.large if hasattr(os, "posix_fadvise") else ():  # macOS has none, and reads one by one
            os.posix_fadvise(self.fd, first * size, _LARGE.size, os.POSIX_FADV_WILLNEED)
        for first, count in self.large:  # not through the map, where each fault reads what lies around it too
            if _LARGE.unpack(os.pread(self.fd, _LARGE.size, first * size)) != (first, _OVERFLOW, count):
                raise _UnsoundError(f"page {first} is not the large value that belongs there")
        self.large.clear()

    def claim_free(self) -> None:
        """Free pages have no other place: each is listed once, and no tree holds it."""
        taken = np.frombuffer(self.taken, np.uint8)
        for begin, n_bytes in self.free:
            n = _NUMBER.unpack_from(self.data, begin)[0] if n_bytes >= _NUMBER.size else n_bytes
            if (n + 1) * _NUMBER.size > n_bytes:
                raise _UnsoundError("a list of free pages is cut")
            pages = np.frombuffer(self.data, "<u8", n, begin + _NUMBER.size).copy()
            if n and not 2 <= pages.min() <= pages.max() <= self.meta.last_page:
                raise _UnsoundError("a page outside of the file is listed as free")
            pages = pages[pages < len(taken)]  # the last pages of a transaction may be freed before they are written
            if taken[pages].any() or (pages[1:] >= pages[:-1]).any():
                raise _UnsoundError("a page in use is listed as free, or a free one twice")
            taken[pages] = 1

    def _claim(self, first: int, count: int) -> None:
        """Pages belong to one place each, and to the file."""
        last = first + count - 1
        if not 2 <= first <= last <= self.meta.last_page:
            raise _UnsoundError(f"page {first} is outside of the file")
        if (last + 1) * self.meta.page_bytes > len(self.data):
            raise _UnsoundError(f"page {first} is beyond the end of the file")
        if self.taken.find(1, first, last + 1) >= 0:
            raise _UnsoundError(f"page {first} is used twice")
        self.taken[first : last + 1] = b"\1" * count
