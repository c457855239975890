"""One suite, run against SQLite and against a real PostgreSQL."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from storage_samples import all_values, overwrite, session

from sessiond import errors
from sessiond.storage import database
from sessiond.storage.batch import LogBatch
from sessiond.storage.catalog import Catalog, Listed, QuotaRow, SessionKey, SessionRow
from sessiond.storage.tables import metadata, session_labels, sessions


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def where(request, tmp_path):
    """Keyword arguments that open the same, first empty, database each time."""
    if request.param == "sqlite":
        return {"path": tmp_path / "catalog.sqlite3"}
    return {"url": request.getfixturevalue("postgres_url")}


@pytest.fixture
def catalog(where):
    catalog = Catalog(**where)
    yield catalog
    catalog.close()


def row(session_id="s1", tenant="t", **changes):
    return SessionRow.of(session(tenant, session_id, **changes))


def stored(catalog, tenant, session_id):
    """The row in the tables, or None."""
    with catalog._engine.connect() as connection:

        def select(table):
            query = sa.select(table).where(table.c.tenant == tenant, table.c.session_id == session_id)
            return connection.execute(query).mappings().all()

        labels = {label["key"]: label["value"] for label in select(session_labels)}
        return next((SessionRow(**found, labels=labels) for found in select(sessions)), None)


def ids(listed):
    return [entry.session_id for entry in listed]


def put(log, *records):
    batch = LogBatch()
    for record in records:
        batch.put_session(record)
    log.write(batch).result()


def test_rows_read_back_equal_and_are_replaced_whole(catalog):
    first = row(labels={"a": "1", "b": "2"}, expire_us=99)
    catalog.upsert_sessions([first])
    assert stored(catalog, "t", "s1") == first
    second = row(labels={"b": "3"}, generation=2, deleted_us=5, purge_us=2**40)
    catalog.upsert_sessions([second])
    assert stored(catalog, "t", "s1") == second
    assert second.state == "deleted"
    assert stored(catalog, "u", "s1") is None


def test_an_older_row_changes_nothing_and_the_last_of_a_batch_wins(catalog):
    catalog.upsert_sessions([row(generation=3, model="new")])
    catalog.upsert_sessions([row(generation=2, model="old")])
    assert stored(catalog, "t", "s1").model == "new"
    catalog.upsert_sessions([row(generation=4, model="a"), row(generation=5, model="b")])
    assert stored(catalog, "t", "s1").model == "b"
    catalog.upsert_sessions([row(generation=7, model="c"), row(generation=6, model="d")])
    assert stored(catalog, "t", "s1").model == "c"


def test_the_longest_allowed_names_fit_the_index(catalog):
    labels = {"k" * 126 + f"{i:02}": "\U0001f600" * 256 for i in range(3)}
    longest = row("s" * 64, "ü" * 64, labels=labels, model="m" * 4000)
    catalog.upsert_sessions([longest])
    assert stored(catalog, "ü" * 64, "s" * 64) == longest


def test_listing_is_stable_and_pages_without_gaps_or_repeats(catalog):
    catalog.upsert_sessions([row(f"s{i:03}", created_us=i // 3) for i in range(700)])
    catalog.upsert_sessions([row("foreign", "u")])
    expected = [f"s{i:03}" for i in reversed(range(700))]
    assert ids(catalog.list_sessions("t", page_size=1000)) == expected
    seen, after = [], None
    while page := catalog.list_sessions("t", page_size=97, after=after):
        seen += ids(page)
        after = page[-1]
    assert seen == expected
    assert ids(catalog.list_sessions("t", after=Listed(0, "s000"))) == []
    assert catalog.count_sessions("t") == 700


def test_filters_combine(catalog):
    catalog.upsert_sessions([
        row("a", labels={"x": "1", "y": "1"}), row("b", labels={"x": "1", "y": "2"}), row("c", labels={}),
        row("d", labels={"x": "1", "y": "1"}, deleted_us=5), row("e", "u", labels={"x": "1"}),
    ])  # fmt: skip
    assert ids(catalog.list_sessions("t", labels={"x": "1"})) == ["d", "b", "a"]
    assert ids(catalog.list_sessions("t", labels={"x": "1", "y": "1"}, state="active")) == ["a"]
    assert ids(catalog.list_sessions("t", state="deleted")) == ["d"]
    assert ids(catalog.list_sessions("t", labels={"x": "' OR 1=1 --"})) == []
    assert catalog.count_sessions("t") == 3


def test_due_finds_expired_and_purgeable(catalog):
    catalog.upsert_sessions([
        row("later", expire_us=101), row("now", expire_us=100), row("never"),
        row("purge", deleted_us=1, purge_us=90, expire_us=50), row("kept", deleted_us=1, purge_us=101),
    ])  # fmt: skip
    due = catalog.due(100)
    assert due.expired == [SessionKey("t", "now")]
    assert due.purgeable == [SessionKey("t", "purge")]


def test_removing_takes_the_labels_along(catalog):
    catalog.upsert_sessions([row(), row("s2")])
    catalog.remove_session("t", "s1")
    catalog.remove_session("t", "s1")
    assert ids(catalog.list_sessions("t")) == ["s2"]
    catalog.upsert_sessions([row(labels={})])
    assert stored(catalog, "t", "s1").labels == {}


def test_tenants_and_quotas(catalog):
    catalog.ensure_tenant("b", 2)
    catalog.ensure_tenant("a", 1)
    catalog.ensure_tenant("b", 3)
    assert catalog.tenants() == ["a", "b"]
    assert catalog.quota("a") == QuotaRow("a")
    catalog.set_quota(QuotaRow("c", max_sessions=5), 1)
    catalog.set_quota(QuotaRow("c", max_disk_bytes=2**50), 1)
    assert catalog.quota("c") == QuotaRow("c", max_disk_bytes=2**50)


def test_reconciling_adds_corrects_and_never_deletes(catalog, log):
    catalog.upsert_sessions([row("lost"), row("wrong", model="stale", generation=9, labels={"old": "1"})])
    put(
        log,
        session(session_id="new"),
        session(session_id="wrong", model="right", generation=2),
        session("u", "other"),
    )
    assert catalog.reconcile(log) == [SessionKey("t", "lost")]
    assert sorted(ids(catalog.list_sessions("t"))) == ["lost", "new", "wrong"]
    assert stored(catalog, "t", "wrong") == row("wrong", model="right", generation=2)
    assert catalog.tenants() == ["t", "u"]
    assert catalog.reconcile(log) == [SessionKey("t", "lost")]


def test_reconciling_reports_a_damaged_record_and_goes_on(catalog, log, log_env):
    put(log, session(session_id="good"), session(session_id="bad"))
    assert catalog.reconcile(log) == []
    key = next(key for key in all_values(log_env) if key.endswith(b"bad"))
    overwrite(log_env, key, b"damaged")
    found = []
    assert catalog.reconcile(log, found.append) == [SessionKey("t", "bad")]
    assert len(found) == 1


def test_reconciling_many_sessions_covers_every_page(catalog, log):
    put(log, *(session(f"t{i % 3}", f"s{i}") for i in range(2100)))
    assert catalog.reconcile(log) == []
    assert sum(catalog.count_sessions(f"t{i}") for i in range(3)) == 2100


def test_contents_survive_reopening_and_migrations_run_once(where):
    first = Catalog(**where)
    first.upsert_sessions([row()])
    first.close()
    first.close()
    second = Catalog(**where)
    assert stored(second, "t", "s1") == row()
    second.close()


def test_the_migrations_make_the_tables_we_declare(catalog):
    with catalog._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_catalog_of_a_newer_version_is_refused(where):
    catalog = Catalog(**where)
    with catalog._engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    catalog.close()
    with pytest.raises(errors.FormatTooNew, match="9999"):
        Catalog(**where)


def test_threads_may_share_a_catalog(catalog):
    def work(n):
        for i in range(10):
            catalog.upsert_sessions([row(f"s{n}-{i}", labels={"n": str(n)})])
            catalog.list_sessions("t", labels={"n": str(n)})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert catalog.count_sessions("t") == 40


def test_sqlite_runs_durable_and_without_mmap(tmp_path):
    catalog = Catalog(path=tmp_path / "c.sqlite3")
    with catalog._engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "mmap_size")
        }
    catalog.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "mmap_size": 0}


@pytest.mark.parametrize("version", ["3.7.0", "3.40.1", "3.51.2"])
def test_sqlite_with_the_wal_reset_bug_is_refused(version):
    with pytest.raises(errors.DependencyMissing, match="pysqlite3"):
        database.check_sqlite_version(version)


def test_fixed_sqlite_is_accepted():
    for version in ("3.51.3", "3.53.4", "4.0.0"):
        database.check_sqlite_version(version)


def test_a_missing_sqlite_build_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pysqlite3", None)
    monkeypatch.setattr(database.sys, "platform", "linux")
    with pytest.raises(errors.DependencyMissing, match="pip install pysqlite3"):
        database.sqlite_module()


@pytest.mark.parametrize("url", ["mysql://x/y", "not a url"])
def test_other_databases_are_refused(url):
    with pytest.raises(errors.InvalidConfig):
        Catalog(url=url)


def test_a_file_that_is_no_database_is_reported(tmp_path):
    (tmp_path / "c.sqlite3").write_bytes(b"not a database at all" * 300)
    with pytest.raises(errors.RecordCorrupt):
        Catalog(path=tmp_path / "c.sqlite3")


def test_an_unreachable_server_is_a_typed_error():
    with pytest.raises(errors.SessiondError, match="catalog"):
        Catalog(url="postgresql://sessiond@127.0.0.1:1/none?connect_timeout=2")
