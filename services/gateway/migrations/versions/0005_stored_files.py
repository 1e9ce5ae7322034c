"""Files whose object may not be there yet.

Revision ID: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # So far a row was written once its object was there, and so it is by gateways of the release before,
    # which go on while the first new one starts: what they do not name they mean to be now.
    op.add_column(
        "files",
        sa.Column("stored_at", sa.DateTime(timezone=True), nullable=True, server_default=sa.func.now()),
    )
    op.execute("UPDATE files SET stored_at = created_at")
    op.create_index("openai_batches_by_end", "openai_batches", ["ended_at"])


def downgrade() -> None:
    op.drop_index("openai_batches_by_end", "openai_batches")
    op.drop_column("files", "stored_at")
