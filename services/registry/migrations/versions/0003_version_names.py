"""Every version name ever given, also of models that were deleted.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "version_names",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("version", sa.Text, primary_key=True),
    )
    op.execute("INSERT INTO version_names (model, version) SELECT model, version FROM versions")


def downgrade() -> None:
    op.drop_table("version_names")
