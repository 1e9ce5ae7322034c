"""Batch jobs, their chunks, callbacks, idempotency keys, uploaded files, outbox.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from services.common.db import outbox_columns

revision = "0001"
down_revision = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("artifact_digest", sa.Text, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("ending", sa.Text),
        sa.Column("input_uri", sa.Text, nullable=False),
        sa.Column("input_format", sa.BigInteger, nullable=False),
        sa.Column("inline_input", sa.LargeBinary),
        sa.Column("etag", sa.Text, nullable=False),
        sa.Column("output_format", sa.BigInteger, nullable=False),
        sa.Column("callback_url", sa.Text, nullable=False),
        sa.Column("priority", sa.BigInteger, nullable=False),
        sa.Column("metadata", JSONB, nullable=False),
        sa.Column("exclude_from_drift", sa.Boolean, nullable=False),
        sa.Column("exclude_from_experiments", sa.Boolean, nullable=False),
        sa.Column("cursor", JSONB),
        sa.Column("is_split", sa.Boolean, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("chunks", sa.BigInteger, nullable=False),
        sa.Column("open_chunks", sa.BigInteger, nullable=False),
        sa.Column("flying_chunks", sa.BigInteger, nullable=False),
        sa.Column("completed", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("rate", sa.Float),
        sa.Column("rate_at", _TIME),
        sa.Column("error", JSONB),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("in_progress_at", _TIME),
        sa.Column("cancelling_at", _TIME),
        sa.Column("ended_at", _TIME),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_until", _TIME),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("is_forgotten", sa.Boolean, nullable=False),
    )
    op.create_index("jobs_by_owner", "jobs", ["key_id", "created_at", "job_id"])
    op.create_index("jobs_by_time", "jobs", ["created_at", "job_id"])
    op.create_index("jobs_under_way", "jobs", ["created_at"], postgresql_where=sa.text("ended_at IS NULL"))
    op.create_index("jobs_to_forget", "jobs", ["ended_at"], postgresql_where=sa.text("ended_at IS NOT NULL"))
    op.create_table(
        "job_chunks",
        sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
        sa.Column("index", sa.BigInteger, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("first_row", sa.BigInteger, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("input", sa.LargeBinary, nullable=False),
        sa.Column("attempt", sa.BigInteger, nullable=False),
        sa.Column("published_at", _TIME),
        sa.Column("done_at", _TIME),
        sa.Column("code", sa.BigInteger, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("field", sa.Text, nullable=False),
        sa.Column("rows_done", sa.BigInteger, nullable=False),
        sa.Column("rows_failed", sa.BigInteger, nullable=False),
        sa.Column("results_object", sa.Text, nullable=False),
        sa.Column("errors_object", sa.Text, nullable=False),
        sa.Column("results_inline", sa.LargeBinary),
        sa.Column("errors_inline", sa.LargeBinary),
    )
    for state in ("open", "flying"):
        where = sa.text(f"state = '{state}'")
        op.create_index(f"job_chunks_{state}", "job_chunks", ["job_id", "index"], postgresql_where=where)
    op.create_table(
        "idempotency_keys",
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("idempotency_key", sa.Text, primary_key=True),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
    )
    op.create_index("idempotency_keys_by_time", "idempotency_keys", ["created_at"])
    op.create_table(
        "deliveries",
        sa.Column("delivery_id", sa.Text, primary_key=True),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("attempts", sa.BigInteger, nullable=False),
        sa.Column("due_at", _TIME, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("last_error", sa.Text, nullable=False),
    )
    op.create_index("deliveries_due", "deliveries", ["due_at"])
    op.create_table(
        "files",
        sa.Column("file_id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME),
        sa.Column("deleted_at", _TIME),
    )
    op.create_index("files_by_owner", "files", ["key_id", "created_at", "file_id"])
    op.create_table("outbox", *outbox_columns())


def downgrade() -> None:
    for table in ("outbox", "files", "deliveries", "idempotency_keys", "job_chunks", "jobs"):
        op.drop_table(table)
