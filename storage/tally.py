"""The sum of all records of an environment, kept in it: what is missing, stale or doubled shows.

A checksum tells that a record is not what was written, not that an older one, or none, stands in its place. That is
what a lost page write does: the page that comes back is an old one, whole and valid. So every transaction also writes
the sum over all records of XXH3-128(key, checksum), modulo 2^128, and its own number. When the environment is opened
all records are walked, looked up and summed again (some microseconds each); only the committed ones give that sum.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import lmdb
from xxhash import xxh3_128_intdigest

from sessiond import errors
from sessiond.storage import envelope, keys
from sessiond.storage.failures import from_lmdb, from_os
from sessiond.storage.mapfile import MapFile, WriteTxn
from sessiond.storage.metapages import check_meta_pages

KEY = keys.global_key(keys.TALLY, "log")
_MODULUS = 1 << 128
_LENGTH = struct.Struct("<I")


@dataclass(slots=True)
class Tally:
    """The sum over the committed records, `KEY` itself left out. Owned by the writer."""

    total: int = 0

    def write(self, txn: WriteTxn, total: int) -> None:
        """Put `total` into the transaction that leads to it."""
        txn.put(KEY, envelope.pack(KEY, {"sum": f"{total:032x}", "txn": txn.id()}))


class TalliedTxn:
    """A write transaction that sums up what it changes: `change` is to be added to the tally once it is committed."""

    def __init__(self, txn: WriteTxn) -> None:
        self._txn = txn
        self.change = 0

    def get(self, key: bytes) -> bytes | None:
        return self._txn.get(key)

    def put(self, key: bytes, value: bytes) -> bool:
        self.forget(key, self._txn.get(key))
        self.change += term(key, value)
        return self._txn.put(key, value)

    def delete(self, key: bytes) -> bool:
        self.forget(key, self._txn.get(key))
        return self._txn.delete(key)

    def cursor(self) -> TalliedCursor:
        return TalliedCursor(self, self._txn.cursor())

    def forget(self, key: bytes, value: bytes | None) -> None:
        if value is not None:
            self.change -= term(key, value)


class TalliedCursor:
    """A cursor whose deletions count. Everything else is LMDB's."""

    def __init__(self, txn: TalliedTxn, cursor: Any) -> None:
        self._txn = txn
        self._cursor = cursor

    def delete(self) -> bool:
        self._txn.forget(self._cursor.key(), self._cursor.value())
        return bool(self._cursor.delete())

    def __enter__(self) -> TalliedCursor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cursor.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


def read_tally(file: MapFile, *, may_lack: bool) -> Tally | None:
    """The tally of an environment, proved by summing all its records; None if it has none and `may_lack` it.

    Raises RecordCorrupt naming the tally if the records are not those that were committed. A record that is damaged
    but stands where it stood raises nothing here: its own checksum tells whoever reads it.
    """
    try:
        check_meta_pages(file.path)
    except OSError as exc:
        raise from_os(exc, f"cannot read {file.path}") from exc
    with file.read() as txn:
        stored = txn.get(KEY)
        n_entries, last = int(txn.stat(file.env.open_db(None, txn))["entries"]), int(txn.id())
        if stored is None:
            if n_entries == 0 or may_lack:
                return None
            raise envelope.corrupt(KEY, "missing beside records")
        header = envelope.unpack(KEY, stored).header
        expected, written = int(str(header["sum"]), 16), int(header["txn"])
        found, n = sum_records(txn, as_stored=True)
        # A compact copy starts counting transactions anew, so the tally's number may be the greater one.
        if written < last or n != n_entries:
            raise envelope.corrupt(KEY, f"is of transaction {written} with {n} of {n_entries} records, not of {last}")
        # A damaged checksum field is that record's damage only: what it should be follows from the record.
        if found != expected and sum_records(txn, as_stored=False)[0] != expected:
            raise envelope.corrupt(KEY, "the records are not those that were committed: some are missing or stale")
    return Tally(expected)


def build_tally(file: MapFile) -> Tally:
    """Sum up what there is and take that as committed. Raises RecordCorrupt, DiskFull or StoreReadOnly."""
    with file.read() as txn:
        tally = Tally(sum_records(txn, as_stored=True)[0])
    try:
        with file.env.begin(write=True) as writing:
            tally.write(writing, tally.total)
    except lmdb.Error as exc:
        raise from_lmdb(exc, "cannot write the tally", opening=True) from exc
    return tally


def sum_records(txn: Any, *, as_stored: bool) -> tuple[int, int]:
    """(sum, number of entries, the tally's among them). Otherwise checksums that do not fit are computed.

    Also proves that keys ascend and are found where they stand: tree pages that changed places give the same sum.
    """
    total = n = 0
    before = b""
    with txn.cursor() as cursor:
        for raw, value in cursor:
            key = bytes(raw)
            if key <= before or txn.get(key) is None:
                raise envelope.corrupt(KEY, f"{keys.readable(key)} stands where no search finds it")
            before = key
            n += 1
            if key != KEY:
                total += term(key, value) if as_stored else _term_as_it_should_be(key, value)
    return total % _MODULUS, n


def term(key: bytes, value: bytes | memoryview) -> int:
    """A record's part of the sum: its key with the checksum inside it, which covers the rest."""
    return xxh3_128_intdigest(_LENGTH.pack(len(key)) + key + bytes(value[envelope.CHECKSUM]))


def _term_as_it_should_be(key: bytes, value: memoryview) -> int:
    try:
        envelope.unpack(key, value)
    except errors.SessiondError:
        computed = envelope.checksum_of(key, value)
        return xxh3_128_intdigest(_LENGTH.pack(len(key)) + key + computed)
    return term(key, value)
