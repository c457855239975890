from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import lmdb
import pytest

from sessiond import errors
from sessiond.storage import environment, space, tally
from sessiond.storage.environment import Environment
from sessiond.storage.failures import from_lmdb, from_os


def put(key, value=b"v"):
    return lambda txn: txn.put(key, value)


def explode(txn):
    raise errors.EtagMismatch("no")


def hold(env):
    """Occupy the writer until the returned event is set, so that what follows forms one group."""
    entered, release = threading.Event(), threading.Event()

    def op(txn):
        entered.set()
        assert release.wait(10)

    env.submit([op], 0)
    assert entered.wait(10)
    return release


def values(env):
    with env.read() as txn:
        return {bytes(k): bytes(v) for k, v in txn.cursor()}


def test_what_waits_during_a_commit_shares_the_next_transaction(log_env):
    release = hold(log_env)
    waiting = [log_env.submit([put(b"k%d" % i)], 10) for i in range(50)]
    before = log_env._commits
    release.set()
    for future in waiting:
        future.result(10)
    assert log_env._commits - before <= 2  # the held one and one for all fifty
    assert log_env.stat().batches == 51


def test_what_a_thread_writes_together_is_one_transaction(log_env):
    before = log_env._commits
    with log_env.together():
        futures = [log_env.submit([put(b"k%d" % i)], 10) for i in range(20)]
        refused = log_env.submit([explode], 10)
        time.sleep(0.05)  # the writer has nothing to do yet, and finds all at once
        assert not any(future.done() for future in futures)
    for future in futures:
        future.result(10)
    assert isinstance(refused.exception(10), errors.EtagMismatch)
    assert len(values(log_env)) == 20
    assert log_env._commits - before == 1
    log_env.submit([put(b"alone")], 10).result(10)


def test_what_is_written_together_is_accepted_though_the_block_raises(log_env):
    futures = []

    def write_and_fail():
        with log_env.together():
            futures.append(log_env.submit([put(b"k")], 10))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    futures[0].result(10)
    assert values(log_env) == {b"k": b"v"}


def test_what_is_written_together_fails_where_the_store_was_closed_meanwhile(log_env):
    with log_env.together():
        futures = [log_env.submit([put(b"k%d" % i)], 10) for i in range(2)]
        log_env.close()
    for future in futures:
        assert isinstance(future.exception(10), errors.Draining)


def test_batches_apply_in_the_order_they_came(log_env):
    release = hold(log_env)
    futures = [log_env.submit([put(b"k", b"%d" % i)], 10) for i in range(20)]
    release.set()
    futures[-1].result(10)
    assert values(log_env) == {b"k": b"19"}


def test_an_invalid_batch_fails_alone_and_whole(log_env):
    release = hold(log_env)
    good = log_env.submit([put(b"a")], 1)
    bad = log_env.submit([put(b"b"), explode], 1)
    bug = log_env.submit([put(b"c"), lambda txn: txn.put(b"", b"x")], 1)
    also_good = log_env.submit([put(b"d")], 1)
    release.set()
    good.result(10)
    also_good.result(10)
    assert isinstance(bad.exception(10), errors.EtagMismatch)
    assert isinstance(bug.exception(10), errors.SessiondError)
    assert values(log_env) == {b"a": b"v", b"d": b"v"}
    log_env.submit([put(b"e")], 1).result(10)


def test_a_transaction_stays_below_its_byte_cap(log_env, monkeypatch):
    monkeypatch.setattr(environment, "MAX_TXN_BYTES", 100)
    release = hold(log_env)
    futures = [log_env.submit([put(b"k%d" % i)], 40) for i in range(6)]
    before = log_env._commits
    release.set()
    for future in futures:
        future.result(10)
    assert log_env._commits - before >= 3


def test_commits_are_synchronous_and_the_map_is_not_writable(log_env):
    flags = log_env._map.env.flags()
    assert flags["sync"]
    assert flags["metasync"]
    assert not flags["writemap"]
    assert log_env._map.env.lib_version() >= (0, 9)
    assert log_env._map.env.lib_version() < (1, 0)


def test_nothing_is_acknowledged_before_its_commit_returns(log_env):
    release = hold(log_env)
    future = log_env.submit([put(b"k")], 1)
    assert not future.done()
    assert values(log_env) == {}
    release.set()
    future.result(10)
    assert values(log_env) == {b"k": b"v"}


def test_an_accepted_batch_cannot_be_cancelled(log_env):
    release = hold(log_env)
    future = log_env.submit([put(b"k")], 1)
    assert not future.cancel()
    release.set()
    future.result(10)


def test_close_writes_what_is_queued(tmp_path):
    env = Environment(str(tmp_path / "e"), map_bytes=1 << 20)
    release = hold(env)
    futures = [env.submit([put(b"k%d" % i)], 1) for i in range(20)]
    threading.Timer(0.05, release.set).start()
    env.close()
    assert all(future.done() and future.exception() is None for future in futures)
    reopened = Environment(str(tmp_path / "e"), map_bytes=1 << 20)
    assert len(values(reopened)) == 20
    reopened.close()


def test_close_waits_for_a_reader(tmp_path):
    env = Environment(str(tmp_path / "e"), map_bytes=1 << 20)
    env.submit([put(b"k")], 1).result(10)
    with env.read() as txn:
        closer = threading.Thread(target=env.close)
        closer.start()
        closer.join(0.05)
        assert closer.is_alive()
        assert bytes(txn.get(b"k")) == b"v"
    closer.join(10)
    assert not closer.is_alive()


def test_a_full_map_is_disk_full_and_passes(tmp_path):
    env = Environment(str(tmp_path / "small"), map_bytes=1 << 20)
    env.submit([put(b"first", bytes(300_000))], 1).result(10)
    small = env.submit([put(b"small")], 1)
    with pytest.raises(errors.DiskFull):
        env.submit([put(b"big", bytes(2 << 20))], 1).result(10)
    small.result(10)
    assert not env.read_only
    env.submit([lambda txn: txn.delete(b"first")], 0, frees=True).result(10)
    env.submit([put(b"again", bytes(300_000))], 1).result(10)
    assert set(values(env)) == {b"small", b"again"}
    env.close()


def test_below_the_reserve_only_deletions_go_through_until_space_returns(log_env, monkeypatch):
    log_env.submit([put(b"old")], 1).result(10)
    with monkeypatch.context() as full:
        full.setattr(log_env, "free_bytes", lambda: 1000)
        with pytest.raises(errors.DiskFull) as caught:
            log_env.submit([put(b"new")], 1).result(10)
        assert caught.value.retry_after
        log_env.submit([lambda txn: txn.delete(b"old")], 0, frees=True).result(10)
    log_env.submit([put(b"new")], 1).result(10)
    assert set(values(log_env)) == {b"new"}


def test_below_the_reserve_space_freed_inside_the_file_is_used(log_env, monkeypatch):
    log_env.submit([put(b"old", bytes(4 << 20))], 4 << 20).result(10)
    log_env.submit([lambda txn: txn.delete(b"old")], 0, frees=True).result(10)
    size = log_env.stat().file_bytes
    monkeypatch.setattr(log_env, "free_bytes", lambda: 1000)
    log_env.submit([put(b"small", bytes(10_000))], 10_000).result(10)
    assert log_env.stat().file_bytes < size + (64 << 10)  # pages freed last are used one transaction later
    with pytest.raises(errors.DiskFull):
        log_env.submit([put(b"big", bytes(2 << 20))], 2 << 20).result(10)


class FailingCommit:
    """An lmdb environment whose outer commits fail as the disk would make them."""

    def __init__(self, env, error):
        self._env, self._error = env, error

    def begin(self, *, write=False, parent=None, buffers=False):
        if parent is not None:
            return self._env.begin(write=write, parent=parent.txn)
        return FailingTxn(self._env.begin(write=write), self._error) if write else self._env.begin(buffers=buffers)


class FailingTxn:
    def __init__(self, txn, error):
        self.txn, self._error = txn, error

    def abort(self):
        self.txn.abort()

    def commit(self):
        self.txn.abort()
        raise self._error


EIO = lmdb.Error(f"mdb_txn_commit: {os.strerror(errno.EIO)}")
ENOSPC = lmdb.DiskError(f"mdb_txn_commit: {os.strerror(errno.ENOSPC)}")
EDQUOT = lmdb.Error(f"mdb_txn_commit: {os.strerror(errno.EDQUOT)}")
PANIC = lmdb.PanicError("mdb_txn_commit: MDB_PANIC")


@pytest.mark.parametrize("error", [EIO, ENOSPC, EDQUOT, PANIC])
def test_after_a_failed_commit_writes_are_refused_and_reads_go_on(tmp_path, error):
    with contextlib.closing(Environment(str(tmp_path / "e"), map_bytes=1 << 20, reserve_bytes=0)) as env:
        env.submit([put(b"k")], 1).result(10)
        real = env._map.env
        env._map.env = FailingCommit(real, error)
        with pytest.raises(errors.StoreReadOnly, match="read-only until restart"):
            env.submit([put(b"lost")], 1).result(10)
        env._map.env = real
        assert env.read_only
        with pytest.raises(errors.StoreReadOnly):
            env.submit([put(b"later")], 1).result(10)
        assert values(env) == {b"k": b"v"}


@pytest.mark.parametrize("error", [EIO, ENOSPC, EDQUOT, PANIC])
def test_a_commit_that_fails_for_want_of_space_is_refused_and_the_next_one_tried(tmp_path, monkeypatch, error):
    with contextlib.closing(Environment(str(tmp_path / "e"), map_bytes=1 << 20, reserve_bytes=0)) as env:
        env.submit([put(b"k")], 1).result(10)
        real = env._map.env
        env._map.env = FailingCommit(real, error)
        with monkeypatch.context() as full:
            full.setattr(space, "is_short", lambda folder, n_bytes: True)
            with pytest.raises(errors.DiskFull) as caught:
                env.submit([put(b"lost")], 1).result(10)
            assert caught.value.retry_after
        env._map.env = real
        assert not env.read_only
        env.submit([put(b"later")], 1).result(10)
        assert values(env) == {b"k": b"v", b"later": b"v"}


def test_a_map_that_is_full_when_the_tally_is_written_passes_too(tmp_path, monkeypatch):
    """Also while somebody holds on to another batch's refusal, whose traceback leads to the transaction."""

    def refuse(self, txn, total):
        raise lmdb.MapFullError("mdb_put: MDB_MAP_FULL")

    with contextlib.closing(Environment(str(tmp_path / "e"), map_bytes=1 << 20, reserve_bytes=0, tallied="new")) as env:
        release = hold(env)
        full, refused = env.submit([put(b"a")], 1), env.submit([explode], 1)
        with monkeypatch.context() as broken:
            broken.setattr(tally.Tally, "write", refuse)
            release.set()
            assert isinstance(full.exception(10), errors.DiskFull)
            kept = refused.exception(10)
        assert isinstance(kept, errors.EtagMismatch)
        env.submit([put(b"b")], 1).result(10)
        assert not env.read_only
        assert values(env).keys() == {tally.KEY, b"b"}


class Panicking(FailingCommit):
    """An environment that answers everything with MDB_PANIC, as LMDB does once a meta page was not written."""

    def begin(self, *, write=False, parent=None, buffers=False):
        raise PANIC

    def close(self):
        self._env.close()


def test_an_environment_in_panic_is_opened_again_while_readers_come_and_go(tmp_path, monkeypatch):
    with contextlib.closing(Environment(str(tmp_path / "e"), map_bytes=1 << 20, reserve_bytes=0)) as env:
        env.submit([put(b"k")], 1).result(10)
        monkeypatch.setattr(space, "is_short", lambda folder, n_bytes: True)
        entered, leave = threading.Event(), threading.Event()

        def reader():
            with env.read() as txn:
                entered.set()
                assert leave.wait(10)
                return bytes(txn.get(b"k"))

        with ThreadPoolExecutor(2) as pool:
            inside = pool.submit(reader)
            assert entered.wait(10)
            env._map.env = Panicking(env._map.env, PANIC)
            refused = env.submit([put(b"lost")], 1)
            late = pool.submit(values, env)  # meets the panic, and waits until the file is open again
            assert not refused.done()
            leave.set()
            assert isinstance(refused.exception(10), errors.DiskFull)
            assert inside.result(10) == b"v"
            assert late.result(10) == {b"k": b"v"}
        env.submit([put(b"later")], 1).result(10)
        assert set(values(env)) == {b"k", b"later"}


def test_a_new_file_gets_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    def die(*_):
        raise SystemExit  # as if the process had ended here

    with monkeypatch.context() as dying:
        dying.setattr(os, "replace", die)
        with pytest.raises(SystemExit):
            Environment(str(tmp_path / "e"), map_bytes=1 << 20)
    assert not (tmp_path / "e" / "data.mdb").exists()
    with contextlib.closing(Environment(str(tmp_path / "e"), map_bytes=1 << 20)) as env:
        env.submit([put(b"k")], 1).result(10)
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"data.mdb", "lock.mdb"}


def test_no_slot_of_the_lock_file_is_a_hole(log_env, tmp_path):
    found = (tmp_path / "log" / "lock.mdb").stat()
    assert found.st_blocks * 512 >= found.st_size > 1024 * 64


def test_space_is_short_where_the_file_system_says_so_or_refuses(tmp_path, monkeypatch):
    assert not space.is_short(str(tmp_path), 1)
    assert space.is_short(str(tmp_path), 1 << 60)

    def over_quota(*_):
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(os, "posix_fallocate", over_quota)
    assert space.is_short(str(tmp_path), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "opening", "expected"),
    [
        (lmdb.MapFullError("full"), False, errors.DiskFull),
        (lmdb.DiskError("x"), False, errors.DiskFull),
        (OSError(errno.ENOSPC, "no space"), False, errors.DiskFull),
        (OSError(errno.EDQUOT, "quota"), False, errors.DiskFull),
        (lmdb.Error(f"x: {os.strerror(errno.EIO)}"), False, errors.StoreReadOnly),
        (lmdb.ReadonlyError("x"), True, errors.DataDirectoryReadOnly),
        (lmdb.Error(f"x: {os.strerror(errno.EROFS)}"), True, errors.DataDirectoryReadOnly),
        (NotADirectoryError(errno.ENOTDIR, "x"), True, errors.DataDirectoryReadOnly),
        (lmdb.CorruptedError("x"), False, errors.RecordCorrupt),
        (lmdb.InvalidError("x"), True, errors.RecordCorrupt),
    ],
)
def test_library_errors_map_to_ours(error, opening, expected):
    assert type(from_lmdb(error, "doing", opening=opening)) is expected


def test_os_errors_map_to_ours():
    assert type(from_os(OSError(errno.ENOSPC, "x"), "doing")) is errors.DiskFull
    assert type(from_os(OSError(errno.EROFS, "x"), "doing")) is errors.DataDirectoryReadOnly


def test_a_file_that_is_no_database_is_reported(tmp_path):
    folder = tmp_path / "e"
    folder.mkdir()
    (folder / "data.mdb").write_bytes(os.urandom(16384))
    with pytest.raises(errors.RecordCorrupt):
        Environment(str(folder), map_bytes=1 << 20)


def test_a_full_queue_makes_writers_wait_and_closing_lets_them_in(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "QUEUED_WRITES", 2)
    env = Environment(str(tmp_path / "e"), map_bytes=1 << 20)
    begun, go_on = threading.Event(), threading.Event()

    def slow(txn) -> None:
        begun.set()
        assert go_on.wait(10)

    env.submit([slow], 1)
    assert begun.wait(10)
    for i in range(2):
        env.submit([put(b"queued%d" % i)], 1)
    third = threading.Thread(target=lambda: env.submit([put(b"third")], 1).result(10))
    third.start()
    third.join(0.2)
    assert third.is_alive(), "the queue has no bound"
    closing = threading.Thread(target=env.close)
    closing.start()
    go_on.set()
    third.join(10)
    closing.join(10)
    assert not third.is_alive()
    assert not closing.is_alive()
    reopened = Environment(str(tmp_path / "e"), map_bytes=1 << 20)
    assert len(values(reopened)) == 3
    reopened.close()
