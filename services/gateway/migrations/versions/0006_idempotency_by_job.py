"""Idempotency keys found by their job, with which they are removed.

Revision ID: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_index("idempotency_keys_by_job", "idempotency_keys", ["job_id"])


def downgrade() -> None:
    op.drop_index("idempotency_keys_by_job", "idempotency_keys")
