"""The SQL catalog's tables. `storage/migrations/` creates them; a test compares the two."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKeyConstraint, Index, MetaData, String, Table, Text

metadata = MetaData()

tenants = Table(
    "tenants",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("created_us", BigInteger, nullable=False),
)

# NULL means no limit.
quotas = Table(
    "quotas",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("max_sessions", BigInteger),
    Column("max_disk_bytes", BigInteger),
    Column("max_running_turns", BigInteger),
    ForeignKeyConstraint(["tenant"], ["tenants.tenant"], ondelete="CASCADE"),
)

# Who may write a session, once several daemons share a catalog; `epoch` fences a paused owner.
leases = Table(
    "leases",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("session_id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("session_id", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("model", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("updated_us", BigInteger, nullable=False),
    Column("last_used_us", BigInteger, nullable=False),
    Column("expire_us", BigInteger),
    Column("deleted_us", BigInteger),
    Column("purge_us", BigInteger),
    Index("sessions_by_creation", "tenant", "created_us", "session_id"),
    Index("sessions_by_expiry", "expire_us"),
    Index("sessions_by_purge", "purge_us"),
)

session_labels = Table(
    "session_labels",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("session_id", String(64), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("value", String(256), nullable=False),
    ForeignKeyConstraint(["tenant", "session_id"], ["sessions.tenant", "sessions.session_id"], ondelete="CASCADE"),
    Index("session_labels_by_value", "tenant", "key", "value"),
)
