"""Streams, windows, signals, alerts and their deliveries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from services.common.db.outbox import outbox_columns

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "streams",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("version", sa.Text, primary_key=True),
        sa.Column("reference", sa.LargeBinary),
        sa.Column("reference_source", sa.Text, nullable=False),
        sa.Column("reference_at", TIME),
        sa.Column("learning", sa.LargeBinary, nullable=False),
        sa.Column("pane", sa.LargeBinary, nullable=False),
        sa.Column("panes", JSONB, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
    )
    op.create_table(
        "windows",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("start_us", sa.BigInteger, nullable=False),
        sa.Column("end_us", sa.BigInteger, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("reference_rows", sa.BigInteger, nullable=False),
        sa.Column("severity", sa.BigInteger, nullable=False),
        sa.Column("features", JSONB, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Index("windows_of_version", "model", "version", "id"),
    )
    op.create_table(
        "signals",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("version", sa.Text, primary_key=True),
        sa.Column("feature", sa.Text, primary_key=True),
        sa.Column("detector", sa.Text, primary_key=True),
        sa.Column("streak", sa.BigInteger, nullable=False),
        sa.Column("calm", sa.BigInteger, nullable=False),
        sa.Column("alerted", sa.BigInteger, nullable=False),
        sa.Column("alert_id", sa.LargeBinary),
    )
    op.create_table(
        "alerts",
        sa.Column("alert_id", sa.LargeBinary, primary_key=True),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("model", "version", "feature", "detector")),
        sa.Column("severity", sa.BigInteger, nullable=False),
        *(
            sa.Column(name, sa.Float(53), nullable=False)
            for name in ("value", "threshold", "critical_value", "p_value")
        ),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in ("window_start_us", "window_end_us", "window_rows", "reference_rows")
        ),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("opened_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.Column("acknowledged_at", TIME),
        sa.Column("resolved_at", TIME),
        sa.Index("alerts_of_model", "model", "opened_at"),
    )
    op.create_table(
        "claims",
        sa.Column("batch_id", sa.LargeBinary, primary_key=True),
        sa.Column("claimed_at", TIME, nullable=False, index=True),
    )
    op.create_table(
        "webhooks",
        sa.Column("webhook_id", sa.LargeBinary, primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("created_at", TIME, nullable=False),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column(
            "webhook_id",
            sa.LargeBinary,
            sa.ForeignKey("webhooks.webhook_id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("body", JSONB, nullable=False),
        sa.Column("attempts", sa.BigInteger, nullable=False),
        sa.Column("next_at", TIME, nullable=False),
        sa.Column("delivered_at", TIME),
        sa.Column("error", sa.Text),
        sa.Index("deliveries_due", "next_at", postgresql_where=sa.text("delivered_at IS NULL")),
    )
    op.create_table("outbox", *outbox_columns())
