from __future__ import annotations

import errno
import os
import threading

import lmdb
import pytest

from sessiond import errors
from sessiond.storage import environment
from sessiond.storage.environment import Environment
from sessiond.storage.failures import from_lmdb, from_os


def put(key, value=b"v"):
    return lambda txn: txn.put(key, value)


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


def test_batches_apply_in_the_order_they_came(log_env):
    release = hold(log_env)
    futures = [log_env.submit([put(b"k", b"%d" % i)], 10) for i in range(20)]
    release.set()
    futures[-1].result(10)
    assert values(log_env) == {b"k": b"19"}


def test_an_invalid_batch_fails_alone_and_whole(log_env):
    def explode(txn):
        raise errors.EtagMismatch("no")

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
    flags = log_env._env.flags()
    assert flags["sync"]
    assert flags["metasync"]
    assert not flags["writemap"]
    assert log_env._env.lib_version() >= (0, 9)
    assert log_env._env.lib_version() < (1, 0)


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

    def begin(self, *, write, parent=None):
        if parent is not None:
            return self._env.begin(write=write, parent=parent.txn)
        return FailingTxn(self._env.begin(write=write), self._error)


class FailingTxn:
    def __init__(self, txn, error):
        self.txn, self._error = txn, error

    def commit(self):
        self.txn.abort()
        raise self._error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lmdb.Error(f"mdb_txn_commit: {os.strerror(errno.EIO)}"), errors.StoreReadOnly),
        (lmdb.DiskError(f"mdb_txn_commit: {os.strerror(errno.ENOSPC)}"), errors.DiskFull),
        (lmdb.PanicError("mdb_txn_commit: MDB_PANIC"), errors.StoreReadOnly),
    ],
)
def test_after_a_failed_commit_writes_are_refused_and_reads_go_on(tmp_path, error, expected):
    env = Environment(str(tmp_path / "e"), map_bytes=1 << 20)
    env.submit([put(b"k")], 1).result(10)
    real = env._env
    env._env = FailingCommit(real, error)
    with pytest.raises(expected):
        env.submit([put(b"lost")], 1).result(10)
    env._env = real
    assert env.read_only
    with pytest.raises(errors.StoreReadOnly):
        env.submit([put(b"later")], 1).result(10)
    assert values(env) == {b"k": b"v"}
    env.close()


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
