"""The first catalog."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("created_us", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "quotas",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("max_sessions", sa.BigInteger),
        sa.Column("max_disk_bytes", sa.BigInteger),
        sa.Column("max_running_turns", sa.BigInteger),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], ondelete="CASCADE"),
    )
    op.create_table(
        "leases",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("session_id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "sessions",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("session_id", sa.String(64), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("updated_us", sa.BigInteger, nullable=False),
        sa.Column("last_used_us", sa.BigInteger, nullable=False),
        sa.Column("expire_us", sa.BigInteger),
        sa.Column("deleted_us", sa.BigInteger),
        sa.Column("purge_us", sa.BigInteger),
    )
    op.create_index("sessions_by_creation", "sessions", ["tenant", "created_us", "session_id"])
    op.create_index("sessions_by_expiry", "sessions", ["expire_us"])
    op.create_index("sessions_by_purge", "sessions", ["purge_us"])
    op.create_table(
        "session_labels",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("session_id", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(128), primary_key=True),
        sa.Column("value", sa.String(256), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "session_id"], ["sessions.tenant", "sessions.session_id"], ondelete="CASCADE"
        ),
    )
    op.create_index("session_labels_by_value", "session_labels", ["tenant", "key", "value"])
