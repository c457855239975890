"""Compacting gives space back, loses nothing, and may die at any step."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from storage_samples import all_values

from sessiond import errors
from sessiond.storage import compaction, mapfile, space
from sessiond.storage.environment import Environment

MAP = 256 << 20
STEPS = ("start", "copied", "synced", "opened", "renamed", "taken", "folder synced")


def put(key: bytes, value: bytes = b"v"):
    return lambda txn: txn.put(key, value)


def fill(env: Environment, n: int = 200) -> dict[bytes, bytes]:
    """Many large values, most of which are deleted again; returns what is left."""
    for i in range(n):
        env.submit([put(b"k%04d" % i, b"%d" % i * 5000)], 1).result()
    env.submit([lambda txn: [txn.delete(b"k%04d" % i) for i in range(5, n)]], 1).result()
    return all_values(env)


def test_it_gives_space_back_and_keeps_every_record(log_env):
    kept = fill(log_env)
    before = os.path.getsize(os.path.join(log_env._path, "data.mdb"))
    log_env.compact().result(30)
    assert os.path.getsize(os.path.join(log_env._path, "data.mdb")) * 4 < before
    assert log_env.stat().file_bytes * 4 < before
    assert all_values(log_env) == kept
    log_env.submit([put(b"after")], 1).result()
    assert all_values(log_env) == {**kept, b"after": b"v"}


def test_an_empty_store_is_compacted_too(tmp_path):
    with contextlib.closing(Environment(str(tmp_path), map_bytes=MAP)) as env:
        env.compact().result(30)
        assert all_values(env) == {}
    with contextlib.closing(Environment(str(tmp_path), map_bytes=MAP)) as env:
        env.submit([put(b"first")], 1).result()
        assert all_values(env) == {b"first": b"v"}


def test_what_was_written_afterwards_is_there_after_a_restart(tmp_path):
    with contextlib.closing(Environment(str(tmp_path), map_bytes=MAP)) as env:
        kept = fill(env)
        env.compact().result(30)
        env.submit([put(b"after")], 1).result()
    with contextlib.closing(Environment(str(tmp_path), map_bytes=MAP)) as env:
        assert all_values(env) == {**kept, b"after": b"v"}


def test_writes_wait_and_reads_go_on_meanwhile(log_env, monkeypatch):
    kept = fill(log_env)
    copied, go_on = threading.Event(), threading.Event()
    write_copy = compaction._write_copy

    def slow(*args):
        write_copy(*args)
        copied.set()
        assert go_on.wait(10)

    monkeypatch.setattr(compaction, "_write_copy", slow)
    compacting = log_env.compact()
    assert copied.wait(10)
    writing = log_env.submit([put(b"meanwhile")], 1)
    assert all_values(log_env) == kept
    assert not writing.done()
    go_on.set()
    writing.result(10)
    compacting.result(10)
    assert all_values(log_env) == {**kept, b"meanwhile": b"v"}


def test_it_waits_for_readers_and_they_for_it(log_env):
    """Reads from many threads while the file is replaced again and again: each sees a whole store."""
    kept = fill(log_env)
    over, wrong = threading.Event(), []

    def read() -> None:
        while not over.is_set():
            found = all_values(log_env)
            if {key: found[key] for key in kept} != kept:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for i in range(20):
        log_env.submit([put(b"n%d" % i)], 1)
        log_env.compact().result(30)
    over.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert len(all_values(log_env)) == len(kept) + 20


def test_without_room_for_the_copy_nothing_is_written(log_env, monkeypatch):
    kept = fill(log_env)
    monkeypatch.setattr(space, "free_bytes", lambda folder: log_env._reserve_bytes + 4096)
    with pytest.raises(errors.DiskFull) as caught:
        log_env.compact().result(10)
    assert caught.value.retry_after
    assert sorted(os.listdir(log_env._path)) == ["data.mdb", "lock.mdb"]
    monkeypatch.undo()
    log_env.submit([put(b"after")], 1).result()
    assert all_values(log_env) == {**kept, b"after": b"v"}


def test_a_copy_that_fails_leaves_the_old_file(log_env, monkeypatch):
    kept = fill(log_env)

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compaction.os, "fsync", no_space)
        with pytest.raises(errors.DiskFull):
            log_env.compact().result(10)
    assert sorted(os.listdir(log_env._path)) == ["data.mdb", "lock.mdb"]
    log_env.submit([put(b"after")], 1).result()
    assert all_values(log_env) == {**kept, b"after": b"v"}


def failing_replace(nth: int):
    calls = []

    def replace(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) == nth:
            raise OSError(5, "Input/output error")
        os.rename(source, target)

    return replace


def broken_open(self: object, path: str) -> None:
    raise errors.StoreReadOnly("Input/output error")


@pytest.mark.parametrize("failing", ["open", "rename"])
def test_a_copy_that_cannot_be_opened_or_renamed_leaves_the_old_file_in_use(log_env, monkeypatch, failing):
    kept = fill(log_env)
    lock = os.stat(os.path.join(log_env._path, "lock.mdb")).st_ino
    with monkeypatch.context() as patch:
        if failing == "open":
            patch.setattr(mapfile.MapFile, "_open", broken_open)
        else:
            patch.setattr(mapfile.os, "replace", failing_replace(1))
        with pytest.raises(errors.DataDirectoryReadOnly, match="goes on with the file it has"):
            log_env.compact().result(10)
        assert not log_env.read_only
        assert all_values(log_env) == kept
    assert sorted(os.listdir(log_env._path)) == ["data.mdb", "lock.mdb"]
    assert os.stat(os.path.join(log_env._path, "lock.mdb")).st_ino == lock
    log_env.submit([put(b"after")], 1).result()
    assert all_values(log_env) == {**kept, b"after": b"v"}


def test_without_its_lock_file_the_new_file_is_read_only(log_env, monkeypatch):
    """Another program that opens the folder would not be seen as a reader: no page may be used again."""
    kept = fill(log_env)
    with monkeypatch.context() as patch:
        patch.setattr(mapfile.os, "replace", failing_replace(2))
        with pytest.raises(errors.StoreReadOnly):
            log_env.compact().result(10)
    assert log_env.read_only
    with pytest.raises(errors.StoreReadOnly):
        log_env.submit([put(b"after")], 1).result()
    assert all_values(log_env) == kept


def test_a_folder_that_cannot_be_synced_makes_the_store_read_only(log_env, monkeypatch):
    """After a power loss either file may be there: a write to one of them would not be durable."""
    kept = fill(log_env)

    def broken(folder: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(compaction, "sync_folder", broken)
    with pytest.raises(errors.StoreReadOnly):
        log_env.compact().result(10)
    assert log_env.read_only
    with pytest.raises(errors.StoreReadOnly):
        log_env.submit([put(b"after")], 1).result()
    assert all_values(log_env) == kept


def test_a_leftover_copy_is_removed_at_open(tmp_path):
    with contextlib.closing(Environment(str(tmp_path), map_bytes=MAP)) as env:
        kept = fill(env)
    (tmp_path / mapfile.COMPACT_NAME).write_bytes(b"half a copy")
    with contextlib.closing(Environment(str(tmp_path), map_bytes=MAP)) as env:
        assert all_values(env) == kept
    assert not (tmp_path / mapfile.COMPACT_NAME).exists()


def test_closing_lets_it_end(tmp_path):
    env = Environment(str(tmp_path), map_bytes=MAP)
    kept = fill(env)
    compacting = env.compact()
    env.close()
    assert compacting.done()
    with pytest.raises(errors.Draining):
        env.compact()
    with contextlib.closing(Environment(str(tmp_path), map_bytes=MAP)) as env:
        assert all_values(env) == kept


def die_at(path: Path, step: str) -> None:
    def dying(name: str, original):
        def call(*args, **kwargs):
            done = original(*args, **kwargs)
            if name == step:
                os._exit(9)
            return done

        return call

    env = Environment(str(path), map_bytes=MAP)
    env.submit([put(b"last")], 1).result()
    compaction._write_copy = dying("synced", compaction._write_copy)
    for name, method in {"opened": "_open", "taken": "take_copy"}.items():
        setattr(mapfile.MapFile, method, dying(name, getattr(mapfile.MapFile, method)))
    mapfile.os.replace = dying("renamed", os.replace)
    compaction.sync_folder = dying("folder synced", compaction.sync_folder)
    if step == "copied":
        compaction.os.fsync = lambda fd: os._exit(9)
    if step == "start":
        compaction.space.free_bytes = lambda folder: os._exit(9)
    env.compact().result(30)
    os._exit(0)


@pytest.mark.parametrize("step", STEPS)
def test_a_death_at_any_step_leaves_a_whole_store(tmp_path, step):
    with contextlib.closing(Environment(str(tmp_path), map_bytes=MAP)) as env:
        kept = fill(env, 50)
    child = multiprocessing.get_context("spawn").Process(target=die_at, args=(tmp_path, step))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    with contextlib.closing(Environment(str(tmp_path), map_bytes=MAP)) as env:
        assert all_values(env) == {**kept, b"last": b"v"}
        env.submit([put(b"after")], 1).result()
        env.compact().result(30)
        assert all_values(env) == {**kept, b"last": b"v", b"after": b"v"}
    assert sorted(os.listdir(tmp_path)) == ["data.mdb", "lock.mdb"]
