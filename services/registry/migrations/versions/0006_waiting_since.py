"""Since when a rollout has waited for workers, where a clock that is set can be allowed for.

Revision ID: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("rollouts", sa.Column("waiting_since", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("rollouts", "waiting_since")
