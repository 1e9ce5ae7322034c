"""Trials by status and by when they were closed, without a look at all that ever were.

Revision ID: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_CLOSED = sa.text("closed_at IS NOT NULL")
_PAUSED = sa.text("paused_at IS NOT NULL")


def upgrade() -> None:
    op.create_index("experiments_status", "experiments", ["status", "experiment_id"])
    op.create_index("experiments_closed", "experiments", ["closed_at"], postgresql_where=_CLOSED)
    op.create_index("rollouts_status", "rollouts", ["status", "rollout_id"])
    op.create_index("rollouts_closed", "rollouts", ["closed_at"], postgresql_where=_CLOSED)
    op.create_index("rollouts_paused", "rollouts", ["rollout_id"], postgresql_where=_PAUSED)


def downgrade() -> None:
    for table, names in (("experiments", ("status", "closed")), ("rollouts", ("status", "closed", "paused"))):
        for name in names:
            op.drop_index(f"{table}_{name}")
