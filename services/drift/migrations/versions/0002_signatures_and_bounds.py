"""Signatures outlive their deployments; what is asked or pruned often has an index."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "signatures",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("version", sa.Text, primary_key=True),
        sa.Column("signature", sa.LargeBinary, nullable=False),
    )
    op.create_index("alerts_open", "alerts", ["model"], postgresql_where=sa.text("resolved_at IS NULL"))
    op.create_index("deliveries_of_webhook", "deliveries", ["webhook_id"])
    op.create_index("deliveries_done", "deliveries", ["delivered_at"])
