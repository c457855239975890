"""The SQL catalog: tenants, quotas and leases, and an index of sessions for listing and expiry.

Of sessions it is never the truth: it may lag behind the log and is reconciled from it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from sessiond import errors
from sessiond.storage.database import migrate, open_postgres, open_sqlite
from sessiond.storage.log import LogStore, OnCorrupt
from sessiond.storage.rows import ACTIVE, DELETED, Due, Listed, QuotaRow, SessionKey, SessionRow
from sessiond.storage.tables import quotas, session_labels, sessions, tenants

__all__ = ["Catalog", "Due", "Listed", "QuotaRow", "SessionKey", "SessionRow"]

_CHUNK = 500
_PAGE = 1000


class Catalog:
    """Thread-safe and blocking: call it from a small pool. SQLite uses one connection behind a lock.

    Every method may raise StoreReadOnly or DiskFull (the database refuses), DataDirectoryReadOnly on open.
    """

    def __init__(self, *, path: Path | None = None, url: str | None = None) -> None:
        """Open and migrate: SQLite in the file `path`, or PostgreSQL at `url`.

        Raises DependencyMissing, InvalidConfig, FormatTooNew, DataDirectoryReadOnly.
        """
        assert (path is None) != (url is None)
        self._engine = open_sqlite(path) if path is not None else open_postgres(url or "")
        self._lock: contextlib.AbstractContextManager[Any] = (
            threading.Lock() if path is not None else contextlib.nullcontext()
        )
        self._insert: Any = sqlite.insert if path is not None else postgresql.insert
        try:
            with self._transaction(opening=True) as connection:
                migrate(connection)
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._engine.dispose()

    def upsert_sessions(self, rows: Sequence[SessionRow]) -> None:
        """Add or update; a row older (by generation) than the stored one changes nothing."""
        newest = {SessionKey(row.tenant, row.session_id): row for row in sorted(rows, key=_generation)}
        fresh = list(newest.values())
        with self._transaction() as connection:
            for at in range(0, len(fresh), _CHUNK):
                self._upsert(connection, fresh[at : at + _CHUNK])

    def remove_session(self, tenant: str, session_id: str) -> None:
        """Forget a purged session and its labels. Absent is fine."""
        with self._transaction() as connection:
            connection.execute(sa.delete(sessions).where(_is(sessions, tenant, session_id)))

    def list_sessions(
        self,
        tenant: str,
        *,
        labels: Mapping[str, str] | None = None,
        state: str | None = None,
        page_size: int = 100,
        after: Listed | None = None,
    ) -> list[Listed]:
        """One page of sessions that have all `labels`, newest first: falling (created_us, session_id)."""
        table = sessions.c
        query = sa.select(table.created_us, table.session_id).where(table.tenant == tenant)
        if state is not None:
            query = query.where(table.state == state)
        if after is not None:
            query = query.where(sa.tuple_(table.created_us, table.session_id) < sa.tuple_(*map(sa.literal, after)))
        for key, value in (labels or {}).items():
            label = session_labels.c
            query = query.where(
                sa.exists().where(
                    label.tenant == table.tenant, label.session_id == table.session_id,
                    label.key == key, label.value == value,
                )
            )  # fmt: skip
        query = query.order_by(table.created_us.desc(), table.session_id.desc()).limit(page_size)
        with self._transaction() as connection:
            return [Listed(*row) for row in connection.execute(query)]

    def count_sessions(self, tenant: str) -> int:
        """Sessions of a tenant that are not deleted."""
        query = sa.select(sa.func.count()).select_from(sessions)
        with self._transaction() as connection:
            found = connection.execute(query.where(sessions.c.tenant == tenant, sessions.c.state == ACTIVE))
            return int(found.scalar_one())

    def due(self, now_us: int, limit: int = 1000) -> Due:
        """Active sessions past expire_us, and deleted ones past purge_us. Check the log before acting."""
        table = sessions.c
        key = sa.select(table.tenant, table.session_id).limit(limit)
        with self._transaction() as connection:
            expired = connection.execute(
                key.where(table.expire_us <= now_us, table.state == ACTIVE).order_by(table.expire_us)
            )
            expired_keys = [SessionKey(*row) for row in expired]
            purgeable = connection.execute(
                key.where(table.purge_us <= now_us, table.state == DELETED).order_by(table.purge_us)
            )
            return Due(expired_keys, [SessionKey(*row) for row in purgeable])

    def ensure_tenant(self, tenant: str, now_us: int) -> None:
        """Record a tenant the first time it is seen."""
        statement = self._insert(tenants).values(tenant=tenant, created_us=now_us).on_conflict_do_nothing()
        with self._transaction() as connection:
            connection.execute(statement)

    def tenants(self) -> list[str]:
        with self._transaction() as connection:
            return [row[0] for row in connection.execute(sa.select(tenants.c.tenant).order_by(tenants.c.tenant))]

    def set_quota(self, quota: QuotaRow, now_us: int) -> None:
        self.ensure_tenant(quota.tenant, now_us)
        statement = self._insert(quotas).values(**asdict(quota))
        changed = {name: statement.excluded[name] for name in QuotaRow.__slots__ if name != "tenant"}
        with self._transaction() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["tenant"], set_=changed))

    def quota(self, tenant: str) -> QuotaRow:
        """The tenant's limits; all None if none are set."""
        with self._transaction() as connection:
            row = connection.execute(sa.select(quotas).where(quotas.c.tenant == tenant)).mappings().first()
        return QuotaRow(tenant) if row is None else QuotaRow(**row)

    def reconcile(self, log: LogStore, on_corrupt: OnCorrupt | None = None) -> list[SessionKey]:
        """Add and correct rows from the log; delete nothing.

        Returns the sessions that SQL knows and the log does not: DATA_LOSS for the caller to report.
        Damaged session records go to `on_corrupt` (or are raised) and are among the returned ones.
        """
        after: tuple[str, str] | None = None
        seen: set[tuple[str, str]] = set()
        while page := log.sessions(None, after, _PAGE, on_corrupt):
            self.correct([SessionRow.of(record) for record in page])
            seen.update((record.tenant, record.session_id) for record in page)
            after = (page[-1].tenant, page[-1].session_id)
            if len(page) < _PAGE:
                break
        return sorted(key for key in self.session_keys() if key not in seen)

    def session_keys(self) -> list[SessionKey]:
        """Every session that has a row."""
        query = sa.select(sessions.c.tenant, sessions.c.session_id)
        with self._transaction() as connection:
            return [SessionKey(*row) for row in connection.execute(query)]

    def has_session(self, tenant: str, session_id: str) -> bool:
        with self._transaction() as connection:
            found = connection.execute(sa.select(sessions.c.generation).where(_is(sessions, tenant, session_id)))
            return found.first() is not None

    def lagging(self, rows: Sequence[SessionRow]) -> list[SessionRow]:
        """Those of `rows` (made from the log) that are missing here, or differ."""
        names = [column.name for column in sessions.columns]
        stored: dict[SessionKey, dict[str, Any]] = {}
        labels: dict[SessionKey, dict[str, str]] = {}
        with self._transaction() as connection:
            for at in range(0, len(rows), _CHUNK):
                ids = [row.session_id for row in rows[at : at + _CHUNK]]
                for found in connection.execute(sa.select(sessions).where(sessions.c.session_id.in_(ids))).mappings():
                    stored[SessionKey(found["tenant"], found["session_id"])] = {name: found[name] for name in names}
                query = sa.select(session_labels).where(session_labels.c.session_id.in_(ids))
                for found in connection.execute(query).mappings():
                    labels.setdefault(SessionKey(found["tenant"], found["session_id"]), {})[found["key"]] = found[
                        "value"
                    ]

        def agrees(row: SessionRow) -> bool:
            key = SessionKey(row.tenant, row.session_id)
            expected = {name: getattr(row, name) for name in names}
            return stored.get(key) == expected and labels.get(key, {}) == dict(row.labels)

        return [row for row in rows if not agrees(row)]

    def correct(self, rows: list[SessionRow]) -> None:
        """Add or update from the log: like upsert, but the log wins whatever generation SQL claims."""
        with self._transaction() as connection:
            for tenant in sorted({row.tenant for row in rows}):
                first_seen = min(row.created_us for row in rows if row.tenant == tenant)
                values = {"tenant": tenant, "created_us": first_seen}
                connection.execute(self._insert(tenants).values(values).on_conflict_do_nothing())
            for at in range(0, len(rows), _CHUNK):
                self._write_rows(connection, rows[at : at + _CHUNK])

    def _upsert(self, connection: sa.Connection, rows: list[SessionRow]) -> None:
        found = connection.execute(
            sa.select(sessions.c.tenant, sessions.c.session_id, sessions.c.generation).where(
                sessions.c.session_id.in_([row.session_id for row in rows])
            )
        )
        newest = {(tenant, session_id): generation for tenant, session_id, generation in found}
        fresh = [row for row in rows if row.generation >= newest.get((row.tenant, row.session_id), row.generation)]
        if fresh:
            self._write_rows(connection, fresh)

    def _write_rows(self, connection: sa.Connection, rows: list[SessionRow]) -> None:
        columns = [column.name for column in sessions.columns]
        statement = self._insert(sessions)
        changed = {name: statement.excluded[name] for name in columns if name not in ("tenant", "session_id")}
        statement = statement.on_conflict_do_update(index_elements=["tenant", "session_id"], set_=changed)
        connection.execute(statement, [{name: getattr(row, name) for name in columns} for row in rows])
        gone = sa.delete(session_labels).where(
            session_labels.c.tenant == sa.bindparam("of_tenant"),
            session_labels.c.session_id == sa.bindparam("of_session"),
        )
        connection.execute(gone, [{"of_tenant": row.tenant, "of_session": row.session_id} for row in rows])
        labels = [
            {"tenant": row.tenant, "session_id": row.session_id, "key": key, "value": value}
            for row in rows
            for key, value in row.labels.items()
        ]
        if labels:
            connection.execute(sa.insert(session_labels), labels)

    @contextlib.contextmanager
    def _transaction(self, *, opening: bool = False) -> Iterator[sa.Connection]:
        with self._lock:
            try:
                with self._engine.begin() as connection:
                    yield connection
            except sa.exc.SQLAlchemyError as exc:
                raise _mapped(exc, opening) from exc


def _generation(row: SessionRow) -> int:
    return row.generation


def _is(table: sa.Table, tenant: str, session_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.tenant == tenant, table.c.session_id == session_id)


def _mapped(exc: sa.exc.SQLAlchemyError, opening: bool) -> errors.SessiondError:
    text = f"catalog: {getattr(exc, 'orig', None) or exc}"
    if "disk is full" in text or "No space left" in text:
        return errors.DiskFull(text)
    if "malformed" in text or "not a database" in text:
        hint = "move it away to have sessions indexed anew; tenants and quotas are only there"
        return errors.RecordCorrupt(f"{text}; {hint}", key="catalog")
    if opening and ("readonly" in text or "unable to open" in text):
        return errors.DataDirectoryReadOnly(text)
    if isinstance(exc, sa.exc.OperationalError):
        return errors.StoreReadOnly(text)
    return errors.SessiondError(text)
