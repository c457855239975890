"""Opening the catalog's database: SQLite by a fixed build or PostgreSQL by URL, and migrating it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.engine import URL, Engine, make_url

from sessiond import errors

# 3.7.0 to 3.51.2 can corrupt a WAL database when two connections write or checkpoint at once.
MIN_SQLITE = (3, 51, 3)
_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x5E5510  # PostgreSQL advisory lock: one daemon migrates at a time


def sqlite_module() -> ModuleType:
    """A DB-API module whose SQLite lacks the WAL-reset bug. Raises DependencyMissing."""
    if sys.platform == "linux":
        try:
            from pysqlite3 import dbapi2
        except ImportError as exc:
            raise errors.DependencyMissing("the catalog needs a current SQLite: pip install pysqlite3") from exc
        module: ModuleType = dbapi2
    else:
        import sqlite3 as module
    check_sqlite_version(module.sqlite_version)
    return module


def check_sqlite_version(version: str) -> None:
    """Raises DependencyMissing for a library in the range of the WAL-reset bug."""
    if tuple(int(part) for part in version.split(".")[:3]) < MIN_SQLITE:
        wanted = ".".join(map(str, MIN_SQLITE))
        raise errors.DependencyMissing(
            f"SQLite {version} can corrupt its WAL (fixed in {wanted}): install pysqlite3>=0.6.1, a Python "
            f"linked to SQLite {wanted} or newer, or use PostgreSQL"
        )


def open_sqlite(path: Path) -> Engine:
    """An engine of one connection: SQLite's single writer. The caller serializes its use."""
    engine = sa.create_engine(
        URL.create("sqlite", database=str(path)),
        module=sqlite_module(),
        poolclass=sa.StaticPool,
        connect_args={"check_same_thread": False, "timeout": 10.0},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy begins transactions, not the driver
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "mmap_size=0"):
            connection.execute(f"PRAGMA {pragma}").fetchall()

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def open_postgres(url: str) -> Engine:
    """An engine over psycopg 3 for any `postgres…` URL. Raises InvalidConfig or DependencyMissing."""
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError as exc:
        raise errors.InvalidConfig("the database URL cannot be parsed") from exc
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise errors.InvalidConfig(f"no support for database {parsed.get_backend_name()!r}: use postgresql://…")
    try:
        return sa.create_engine(
            parsed.set(drivername="postgresql+psycopg"), pool_size=2, max_overflow=2, pool_pre_ping=True
        )
    except ImportError as exc:
        raise errors.DependencyMissing("PostgreSQL needs the extra: pip install 'sessiond[postgres]'") from exc


def migrate(connection: sa.Connection) -> None:
    """Bring the schema to its newest version, inside the caller's transaction.

    Raises FormatTooNew when the database was migrated by a newer version.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
    script = ScriptDirectory(str(_MIGRATIONS), version_locations=[str(_MIGRATIONS)])

    def steps(current: Any, _context: Any) -> Any:
        known = {revision.revision for revision in script.walk_revisions()}
        unknown = [name for name in (current if isinstance(current, tuple) else (current,)) if name not in known]
        if current and unknown:
            raise errors.FormatTooNew(f"the catalog has schema {unknown[0]}, written by a newer version")
        return script._upgrade_revs("head", current)

    with EnvironmentContext(Config(), script, fn=steps) as context:
        context.configure(connection=connection)
        context.run_migrations()
