"""Claims, inbox and segments of the prediction store, and outcomes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "claims",
        sa.Column("batch_id", sa.LargeBinary, primary_key=True),
        sa.Column("claimed_at", TIME, nullable=False, index=True),
    )
    op.create_table(
        "inbox",
        sa.Column("batch_id", sa.LargeBinary, primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("received_at", TIME, nullable=False),
        sa.Column("request_ids", sa.LargeBinary, nullable=False),
        sa.Column("value", sa.LargeBinary, nullable=False),
        sa.Index("inbox_of_version", "model", "version", "received_at"),
    )
    op.create_table(
        "segments",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("object", sa.Text, nullable=False, unique=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("layout", sa.Text, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("first_id", sa.LargeBinary, nullable=False),
        sa.Column("last_id", sa.LargeBinary, nullable=False),
        sa.Column("first_at_us", sa.BigInteger, nullable=False),
        sa.Column("last_at_us", sa.BigInteger, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("dropped_at", TIME),
        sa.Index("segments_of_version", "model", "version", postgresql_where=sa.text("dropped_at IS NULL")),
        sa.Index("segments_by_id", "last_id", "first_id", postgresql_where=sa.text("dropped_at IS NULL")),
    )
    op.create_table(
        "outcomes",
        sa.Column("event_id", sa.LargeBinary, primary_key=True),
        sa.Column("request_id", sa.LargeBinary, nullable=False, index=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("metric", sa.Text, nullable=False),
        sa.Column("number", sa.Float),
        sa.Column("text", sa.Text),
        sa.Column("row", sa.BigInteger, nullable=False),
        sa.Column("observed_at_us", sa.BigInteger, nullable=False),
        sa.Column("received_at", TIME, nullable=False),
        sa.Index("outcomes_of_metric", "model", "metric"),
    )
