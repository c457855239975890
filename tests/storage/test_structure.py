from __future__ import annotations

import contextlib
import struct

import pytest
from storage_samples import LOG_MAP

from sessiond import errors
from sessiond.storage.environment import Environment
from sessiond.storage.metapages import newest_meta
from sessiond.storage.structure import check_structure

PAGE = 4096


@pytest.fixture
def folder(tmp_path):
    """A tree of several levels, with values in pages of their own and with free pages."""
    folder = tmp_path / "e"
    with contextlib.closing(Environment(str(folder), map_bytes=LOG_MAP)) as env:
        for at in range(0, 3000, 500):
            ops = [
                lambda txn, i=i: txn.put(b"%06d" % i, bytes(9000 if i % 100 == 0 else 40)) for i in range(at, at + 500)
            ]
            env.submit(ops, 1000).result(10)
        env.submit([lambda txn: [txn.delete(b"%06d" % i) for i in range(0, 3000, 7)]], 0, frees=True).result(10)
    return folder


def put(txn, i):
    txn.put(b"%06d" % i, bytes(9000 if i % 100 == 0 else 40))


def pages(folder, flag):
    data = (folder / "data.mdb").read_bytes()
    return [n for n in range(2, len(data) // PAGE) if struct.unpack_from("<QHH", data, n * PAGE)[::2] == (n, flag)]


def change(folder, at, raw):
    with (folder / "data.mdb").open("r+b") as file:
        file.seek(at)
        file.write(raw)


def refused(folder):
    try:
        check_structure(str(folder), "; a hint")
    except errors.RecordCorrupt as exc:
        return "; a hint" in exc.message
    return False


def test_a_sound_file_passes(folder):
    check_structure(str(folder))


@pytest.mark.parametrize("flag", [1, 2], ids=["branch", "leaf"])
@pytest.mark.parametrize(
    ("offset", "raw"),
    [
        (0, bytes(PAGE)),
        (0, struct.pack("<Q", 7777)),
        (10, struct.pack("<H", 4)),
        (12, struct.pack("<H", 3)),
        (14, struct.pack("<H", 9)),
        (16, struct.pack("<H", 4095)),
        (16, struct.pack("<H", 8)),
    ],
    ids=["zeroed", "number", "kind", "table", "bounds", "node-above", "node-below"],
)
def test_a_damaged_page_is_named_before_lmdb_meets_it(folder, flag, offset, raw):
    found = 0
    sound = (folder / "data.mdb").read_bytes()
    for page in pages(folder, flag):
        change(folder, page * PAGE + offset, raw)
        found += refused(folder)
        (folder / "data.mdb").write_bytes(sound)
    assert found > 0  # those in use; others are free
    assert not refused(folder)


def test_a_file_that_is_cut_is_refused(folder):
    with (folder / "data.mdb").open("r+b") as file:
        file.truncate((folder / "data.mdb").stat().st_size - 3 * PAGE)
    assert refused(folder)
    with pytest.raises(errors.RecordCorrupt):
        Environment(str(folder), map_bytes=LOG_MAP)


def free_lists(folder):
    """Where each list of free pages stands in the file, how many it names, and all that any does."""
    data = (folder / "data.mdb").read_bytes()
    root, depth = newest_meta(data).trees[0]
    assert depth == 1
    at, n = root * PAGE, (struct.unpack_from("<H", data, root * PAGE + 12)[0] - 16) // 2
    found = []
    for node in struct.unpack_from(f"<{n}H", data, at + 16):
        low, high, flags, n_key = struct.unpack_from("<HHHH", data, at + node)
        assert not flags
        assert low | high << 16 >= 8
        count = struct.unpack_from("<Q", data, at + node + 8 + n_key)[0]
        found.append((at + node + 8 + n_key, struct.unpack_from(f"<{count}Q", data, at + node + 16 + n_key)))
    return found


def test_a_page_in_use_that_is_listed_as_free_is_refused_before_it_is_written_over(folder):
    lists = free_lists(folder)
    free = {page for _, pages in lists for page in pages}
    (at, listed), used = lists[0], set(pages(folder, 1) + pages(folder, 2)) - free
    assert used
    for page in used:  # tree pages of both trees
        change(folder, at + 8, struct.pack("<Q", page))
        assert refused(folder), page
    for wrong in (0, 1, 1 << 40, listed[1]):
        change(folder, at + 8, struct.pack("<Q", wrong))
        assert refused(folder), wrong
    change(folder, at + 8, struct.pack("<Q", listed[0]))
    change(folder, at, struct.pack("<Q", 1 << 30))
    assert refused(folder)
    change(folder, at, struct.pack("<Q", len(listed)))
    assert not refused(folder)


def test_one_flipped_bit_in_the_free_list_loses_no_record_of_a_store_that_goes_on(folder):
    """Without the check the next transactions take pages in use, and records of others are gone without a word."""
    (at, listed), *_ = free_lists(folder)
    used = set(pages(folder, 2)) - {page for _, found in free_lists(folder) for page in found}
    place, page = next((i, p ^ 1 << b) for i, p in enumerate(listed) for b in range(8) if p ^ 1 << b in used)
    change(folder, at + 8 + 8 * place, struct.pack("<Q", page))
    with pytest.raises(errors.RecordCorrupt, match="in use is listed as free"):
        Environment(str(folder), map_bytes=LOG_MAP)


def test_a_large_value_that_says_it_has_more_pages_is_refused_before_it_is_deleted(folder):
    """LMDB would free them all, and the next transactions write over those that are another record's."""
    data = (folder / "data.mdb").read_bytes()
    large = [n for n in range(2, len(data) // PAGE) if struct.unpack_from("<Q2xHI", data, n * PAGE) == (n, 4, 3)]
    found = 0
    for page in large:
        change(folder, page * PAGE + 12, struct.pack("<I", 3 | 16))
        found += refused(folder)
        change(folder, page * PAGE + 12, struct.pack("<I", 3))
    assert found > 0  # those in use
    assert not refused(folder)


def test_a_store_of_kv_is_refused_too_when_a_large_value_says_it_has_more_pages(tmp_path):
    """As `blocks` is opened, which keeps no tally."""
    folder = tmp_path / "blocks"
    with contextlib.closing(Environment(str(folder), map_bytes=LOG_MAP)) as env:
        env.submit([lambda txn: [txn.put(b"%03d" % i, bytes(9000)) for i in range(200)]], 1000).result(10)
    change(folder, pages(folder, 4)[100] * PAGE + 12, struct.pack("<I", 3 | 16))
    with pytest.raises(errors.RecordCorrupt, match="not the large value"):
        Environment(str(folder), map_bytes=LOG_MAP)


def test_pages_freed_by_a_transaction_to_come_are_refused_before_lmdb_ends_the_process(folder):
    (at, _), *_ = free_lists(folder)
    freed_by = struct.unpack_from("<Q", (folder / "data.mdb").read_bytes(), at - 8)[0]
    for wrong in (0, 1 << 20, 1 << 63):
        change(folder, at - 8, struct.pack("<Q", wrong))
        assert refused(folder), wrong
    change(folder, at - 8, struct.pack("<Q", freed_by))
    assert not refused(folder)
