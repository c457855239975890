from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from storage_samples import BLOCK_MAP, LOG_MAP, assert_kv_equal, destinations, kv_arrays, revision, session

from sessiond import errors
from sessiond.storage import directory
from sessiond.storage.batch import LogBatch
from sessiond.storage.catalog import Listed, SessionKey, SessionRow
from sessiond.storage.codec import Raw
from sessiond.storage.kv import KVOwner, encode_kv
from sessiond.storage.store import Store


def open_store(path, **options):
    return Store.open(path, log_map_bytes=LOG_MAP, block_map_bytes=BLOCK_MAP, **options)


def test_everything_survives_closing_and_opening(tmp_path):
    owner, arrays = KVOwner("t", "cell", bytes(16)), kv_arrays()
    with open_store(tmp_path / "deep" / "data") as store:
        batch = LogBatch()
        batch.put_session(session())
        batch.put_revision(revision(), b"messages")
        batch.append_tokens("t", "r1", 0, np.arange(3))
        store.log.write(batch).result()
        store.blocks.write(encode_kv(owner, 0, arrays, codec=Raw()).records).result()
        assert store.free_bytes() > 0
    with open_store(tmp_path / "deep" / "data") as store:
        assert store.log.session("t", "s1") == session()
        assert store.log.messages("t", "r1") == b"messages"
        assert store.log.tokens("t", "r1", 3)[0].tolist() == [0, 1, 2]
        buffers, out = destinations()
        store.blocks.read_into(owner, 0, 63, 3, out)
        assert_kv_equal(buffers, arrays)
        assert store.catalog.list_sessions("t") == [Listed(session().created_us, "s1")]  # by reconciliation
        assert (store.lost, store.damaged) == ([], [])


def test_cell_size_is_fixed_when_the_directory_is_made(tmp_path):
    with open_store(tmp_path, cell_tokens=256) as store:
        assert store.cell_tokens == 256
    with open_store(tmp_path, cell_tokens=128) as store:
        assert store.cell_tokens == 256
    said = json.loads((tmp_path / "FORMAT").read_bytes())
    assert (said["format"], said["cell_tokens"]) == (1, 256)


@pytest.mark.parametrize("cell_tokens", [0, -1, 1 << 20])
def test_an_absurd_cell_size_is_refused(tmp_path, cell_tokens):
    with pytest.raises(errors.InvalidConfig):
        open_store(tmp_path, cell_tokens=cell_tokens)


def test_a_session_only_sql_knows_is_reported_as_lost(tmp_path):
    with open_store(tmp_path) as store:
        store.catalog.upsert_sessions([SessionRow.of(session(session_id="ghost"))])
    with open_store(tmp_path) as store:
        assert store.lost == [SessionKey("t", "ghost")]


def test_a_second_daemon_is_refused_in_the_same_process(tmp_path):
    with open_store(tmp_path), pytest.raises(errors.DataDirectoryBusy):
        open_store(tmp_path)
    open_store(tmp_path).close()


def test_a_second_daemon_is_refused_in_another_process(tmp_path):
    code = (
        "import sys\nfrom sessiond import errors\nfrom sessiond.storage.store import Store\n"
        "try:\n    Store.open(sys.argv[1])\nexcept errors.DataDirectoryBusy:\n    sys.exit(7)\n"
    )
    with open_store(tmp_path):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == 7


def test_a_newer_format_is_refused_and_left_alone(tmp_path):
    open_store(tmp_path).close()
    newer = b'{"format":2,"whatever":[]}'
    (tmp_path / "FORMAT").write_bytes(newer)
    with pytest.raises(errors.FormatTooNew) as caught:
        open_store(tmp_path)
    assert caught.value.metadata == {"format": "2", "supported": "1"}
    assert (tmp_path / "FORMAT").read_bytes() == newer


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b'{"format":1}', b'{"format":0,"cell_tokens":128}', b"\xff", b"[" * 9999]
)
def test_a_damaged_format_file_is_corruption(tmp_path, damaged):
    open_store(tmp_path).close()
    (tmp_path / "FORMAT").write_bytes(damaged)
    with pytest.raises(errors.RecordCorrupt, match="FORMAT"):
        open_store(tmp_path)
    (tmp_path / "FORMAT").unlink()
    with pytest.raises(errors.RecordCorrupt, match="missing beside"):
        open_store(tmp_path)


def test_unknown_fields_of_this_format_are_ignored(tmp_path):
    open_store(tmp_path).close()
    said = json.loads((tmp_path / "FORMAT").read_bytes()) | {"new": 1}
    (tmp_path / "FORMAT").write_text(json.dumps(said | {"check": directory._check(said)}))
    open_store(tmp_path).close()


def test_a_file_in_the_way_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(errors.DataDirectoryReadOnly):
            open_store(path)


def test_a_read_only_directory_is_refused(tmp_path):
    # Modes do not stop root, so a root test run becomes another user after importing.
    code = (
        "import os, sys\nfrom sessiond import errors\nfrom sessiond.storage.store import Store\n"
        "import alembic.context, sqlalchemy.dialects.sqlite.pysqlite\n"
        "if os.geteuid() == 0:\n    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try:\n    Store.open(sys.argv[1]).close()\n"
        "except errors.DataDirectoryReadOnly:\n    sys.exit(7)\n"
    )
    import shutil
    import tempfile

    folder = tempfile.mkdtemp()  # pytest's own folders are closed to other users
    try:
        os.chmod(folder, 0o555)
        arguments = [sys.executable, "-c", code]
        assert subprocess.run([*arguments, folder], timeout=60).returncode == 7
        assert subprocess.run([*arguments, folder + "/below"], timeout=60).returncode == 7
        os.chmod(folder, 0o777)
        assert subprocess.run([*arguments, folder + "/below"], timeout=60).returncode == 0
    finally:
        shutil.rmtree(folder)


def test_a_failed_open_leaves_nothing_open(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "catalog.sqlite3").write_bytes(b"garbage" * 1000)
    for _ in range(2):
        with pytest.raises(errors.RecordCorrupt):
            open_store(tmp_path / "data")
    (tmp_path / "data" / "catalog.sqlite3").unlink()
    open_store(tmp_path / "data").close()


def test_close_is_idempotent(tmp_path):
    store = open_store(tmp_path)
    store.close()
    store.close()


def test_ids_never_become_paths(tmp_path):
    evil = "../../../evil"
    with open_store(tmp_path / "data") as store:
        batch = LogBatch()
        batch.put_session(session(evil, evil))
        store.log.write(batch).result()
        assert store.log.session(evil, evil).tenant == evil
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.postgres
def test_a_store_works_over_postgres(tmp_path, postgres_url):
    for _ in range(2):
        with open_store(tmp_path, database_url=postgres_url) as store:
            batch = LogBatch()
            batch.put_session(session())
            store.log.write(batch).result()
            store.catalog.upsert_sessions([SessionRow.of(session())])
            assert not (tmp_path / "catalog.sqlite3").exists()
