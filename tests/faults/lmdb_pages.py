"""Which pages of an LMDB 0.9 file hold the current tree: damage to free pages would prove nothing."""

from __future__ import annotations

import struct

PAGE = 4096
_META = struct.Struct("<IIQQ")  # behind the page header: magic, version, address, map size
_DB = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, branch, leaf and overflow pages, entries, root
_HEADER = struct.Struct("<QHHHH")  # page number, pad, flags, lower and upper bound of free space
_NODE = struct.Struct("<HHHH")  # data size or page number (low, high), flags or page number's top, key size
_BRANCH, _LEAF, _BIG = 1, 2, 1
_NONE = (1 << 64) - 1


def live_pages(data: bytes, trees: tuple[int, ...] = (0, 1)) -> list[int]:
    """Both meta pages, and of the newest one the list of free pages and the records: tree and overflow pages.

    `trees`: 0 is the list of free pages, 1 the records.
    """
    meta = max((0, 1), key=lambda page: _txn_id(data, page))
    roots = [_DB.unpack_from(data, meta * PAGE + 16 + _META.size + tree * _DB.size)[7] for tree in trees]
    found, todo = [0, 1], [root for root in roots if root != _NONE]
    while todo:
        page = todo.pop()
        found.append(page)
        at = page * PAGE
        _, _, flags, lower, _ = _HEADER.unpack_from(data, at)
        for i in range((lower - _HEADER.size) // 2):
            node = at + struct.unpack_from("<H", data, at + _HEADER.size + 2 * i)[0]
            low, high, top, n_key = _NODE.unpack_from(data, node)
            if flags & _BRANCH:
                todo.append(low | high << 16 | top << 32)
            elif top & _BIG:
                first = struct.unpack_from("<Q", data, node + _NODE.size + n_key)[0]
                n_pages = struct.unpack_from("<I", data, first * PAGE + 12)[0]
                found.extend(range(first, first + n_pages))
    return sorted(found)


def _txn_id(data: bytes, page: int) -> int:
    return int(struct.unpack_from("<Q", data, page * PAGE + 16 + _META.size + 2 * _DB.size + 8)[0])
