"""Batches of OpenAI's API.

Revision ID: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "openai_batches",
        sa.Column("batch_id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("input_file_id", sa.Text, nullable=False),
        sa.Column("metadata", JSONB, nullable=False),
        sa.Column("output_expires_s", sa.BigInteger),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("errors", JSONB),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("completed", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("shown", JSONB),
        sa.Column("job_id", sa.Text),
        sa.Column("output_file_id", sa.Text),
        sa.Column("error_file_id", sa.Text),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("in_progress_at", _TIME),
        sa.Column("finalizing_at", _TIME),
        sa.Column("cancelling_at", _TIME),
        sa.Column("ended_at", _TIME),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.Column("due_at", _TIME, nullable=False),
        sa.Column("attempts", sa.BigInteger, nullable=False),
    )
    op.create_index("openai_batches_by_owner", "openai_batches", ["key_id", "created_at", "batch_id"])
    still_open = sa.text("state IN ('validating', 'running', 'finalizing')")
    op.create_index("openai_batches_due", "openai_batches", ["due_at"], postgresql_where=still_open)


def downgrade() -> None:
    op.drop_table("openai_batches")
