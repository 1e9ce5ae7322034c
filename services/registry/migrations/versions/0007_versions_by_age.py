"""A model's versions by age: a list of them is read in pages.

Revision ID: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_index("versions_by_age", "versions", ["model", "created_at", "version"])


def downgrade() -> None:
    op.drop_index("versions_by_age")
