from __future__ import annotations

import contextlib

import lmdb
import numpy as np
import pytest
from storage_samples import LOG_MAP, overwrite, request, revision, session

from sessiond import errors
from sessiond.storage import keys, tally
from sessiond.storage.batch import LogBatch
from sessiond.storage.directory import read_or_create_format
from sessiond.storage.environment import Environment
from sessiond.storage.log import LogStore
from sessiond.storage.store import Store


def opened(path, tallied="yes"):
    return contextlib.closing(Environment(str(path), map_bytes=LOG_MAP, tallied=tallied))


def write_some(env):
    log = LogStore(env)
    batch = LogBatch()
    batch.put_session(session())
    batch.put_revision(revision(), b"[]")
    batch.append_tokens("t", "r1", 0, np.arange(3))
    batch.append_tokens("t", "r1", 3, np.arange(2))
    batch.put_request(request())
    log.write(batch).result(10)
    return log


def behind_its_back(path, change):
    """Change the file as a lost or misplaced page would: the tally's own record is that of the last transaction."""
    with lmdb.open(str(path), map_size=LOG_MAP, lib_version=0) as env, env.begin(write=True) as txn:
        change(txn)
        stored = tally.envelope.unpack(tally.KEY, memoryview(txn.get(tally.KEY))).header
        tally.Tally().write(txn, int(stored["sum"], 16))


def test_the_sum_follows_every_change(tmp_path):
    with opened(tmp_path) as env:
        log = write_some(env)
        for change in (
            lambda batch: batch.put_session(session(generation=2)),
            lambda batch: batch.put_session(session(generation=2)),  # the same again
            lambda batch: batch.delete_requests("t", "s1"),
            lambda batch: batch.delete_revision("t", "r1"),
            lambda batch: batch.delete_session("t", "absent"),
        ):
            batch = LogBatch()
            change(batch)
            log.write(batch).result(10)
            with env.read() as txn:
                assert tally.sum_records(txn, as_stored=True)[0] == env._tally.total
    with opened(tmp_path) as env:
        assert LogStore(env).session("t", "s1").generation == 2


def test_a_refused_batch_adds_nothing(tmp_path):
    with opened(tmp_path) as env:
        log = write_some(env)
        batch = LogBatch()
        batch.put_request(request(request_id="q2"))
        batch.put_session(session(generation=9), expect_generation=7)
        with pytest.raises(errors.EtagMismatch):
            log.write(batch).result(10)
    with opened(tmp_path) as env:
        assert LogStore(env).request("t", "s1", "q2") is None


SESSION = keys.record_key("t", keys.SESSION, "s1")
REQUEST = keys.record_key("t", keys.REQUEST, "s1", "q1")


@pytest.mark.parametrize("tallied", ["yes", "new"])
@pytest.mark.parametrize("key", [SESSION, REQUEST, keys.tokens_key("t", "r1", 3)])
def test_a_record_that_is_gone_keeps_the_log_from_opening(tmp_path, key, tallied):
    with opened(tmp_path) as env:
        write_some(env)
    behind_its_back(tmp_path, lambda txn: txn.delete(key))
    with pytest.raises(errors.RecordCorrupt, match="missing or stale"), opened(tmp_path, tallied):
        pass


def test_an_older_state_of_a_record_keeps_the_log_from_opening(tmp_path):
    with opened(tmp_path) as env:
        log = write_some(env)
        with env.read() as txn:
            older = bytes(txn.get(SESSION))
        batch = LogBatch()
        batch.put_session(session(generation=2))
        log.write(batch).result(10)
    behind_its_back(tmp_path, lambda txn: txn.put(SESSION, older))
    with pytest.raises(errors.RecordCorrupt, match="missing or stale"), opened(tmp_path):
        pass


def test_a_commit_that_the_tally_does_not_know_keeps_the_log_from_opening(tmp_path):
    with opened(tmp_path) as env:
        write_some(env)
    with lmdb.open(str(tmp_path), map_size=LOG_MAP, lib_version=0) as env, env.begin(write=True) as txn:
        txn.put(b"\x01tzx", b"y")
    with pytest.raises(errors.RecordCorrupt, match="of transaction"), opened(tmp_path):
        pass


def test_a_log_without_its_tally_is_refused_unless_it_never_had_one(tmp_path):
    with opened(tmp_path, "no") as env:
        write_some(env)
    with pytest.raises(errors.RecordCorrupt, match="missing beside records"), opened(tmp_path):
        pass
    with opened(tmp_path, "new"):
        pass
    with opened(tmp_path) as env:
        assert LogStore(env).session("t", "s1") == session()


@pytest.mark.parametrize("at", [30, 50])  # within the checksum; behind it
def test_a_flipped_bit_is_its_records_damage_only(tmp_path, at):
    with opened(tmp_path) as env:
        write_some(env)

    def flip(txn):
        value = bytearray(txn.get(SESSION))
        value[at] ^= 4
        txn.put(SESSION, bytes(value))

    behind_its_back(tmp_path, flip)
    with opened(tmp_path) as env:
        log = LogStore(env)
        with pytest.raises(errors.RecordCorrupt, match="checksum"):
            log.session("t", "s1")
        assert log.request("t", "s1", "q1") == request()


def test_a_stale_meta_page_keeps_the_log_from_opening(tmp_path):
    with opened(tmp_path) as env:
        write_some(env)
        path = tmp_path / "data.mdb"
        old = path.read_bytes()[: 2 * 4096]
        for i in range(5):
            overwrite(env, b"\x01tsk%d" % i, b"v")
    new = path.read_bytes()
    for page in (0, 1):
        at = slice(page * 4096, (page + 1) * 4096)
        path.write_bytes(new[: at.start] + old[at] + new[at.stop :])
        with pytest.raises(errors.RecordCorrupt, match="stale"), opened(tmp_path):
            pass
    path.write_bytes(new)
    with opened(tmp_path):
        pass


def test_accepted_damage_is_told_and_then_counts(tmp_path):
    with Store.open(tmp_path / "d", log_map_bytes=LOG_MAP, block_map_bytes=LOG_MAP) as store:
        write_some(store.log._env)
    behind_its_back(tmp_path / "d" / "log", lambda txn: txn.delete(REQUEST))
    with pytest.raises(errors.RecordCorrupt, match="missing or stale"):
        Store.open(tmp_path / "d")
    with Store.open(tmp_path / "d", accept_damage=True) as store:
        assert "missing or stale" in store.damaged[0].message
        assert store.log.request("t", "s1", "q1") is None
    with Store.open(tmp_path / "d") as store:
        assert store.damaged == []


def test_a_compact_copy_opens(tmp_path):
    with opened(tmp_path / "e") as env:
        log = write_some(env)
        for i in range(5):
            batch = LogBatch()
            batch.put_session(session(generation=i))
            log.write(batch).result(10)
        (tmp_path / "copy").mkdir()
        env._map.env.copy(str(tmp_path / "copy"), compact=True)
    for _ in range(2):
        with opened(tmp_path / "copy") as env:
            write_some(env)


def test_a_directory_of_an_early_version_gets_its_tally_once(tmp_path):
    form = tmp_path / "FORMAT"
    with Store.open(tmp_path) as store:
        write_some(store.log._env)
        store.log._env._tally = None
        overwrite(store.log._env, tally.KEY, None)
    form.write_text('{"cell_tokens":128,"created_by":"0.1.0","created_us":1,"format":1}\n')
    assert not read_or_create_format(tmp_path, 128).tallied
    with Store.open(tmp_path) as store:
        assert store.log.session("t", "s1") == session()
    assert read_or_create_format(tmp_path, 128).tallied
    form.write_text(form.read_text().replace('"cell_tokens":128', '"cell_tokens":129'))
    with pytest.raises(errors.RecordCorrupt, match="checksum"):
        read_or_create_format(tmp_path, 128)
