"""How often workers could not do a chunk, apart from how often it was published.

Revision ID: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("job_chunks", sa.Column("refusals", sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("job_chunks", "refusals")
