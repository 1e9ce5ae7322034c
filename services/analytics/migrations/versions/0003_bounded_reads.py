"""Records of the inbox without their tensors, and outcomes by the time at which they were observed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Null: as long as it was written by an older release, until it is flushed.
    op.add_column("inbox", sa.Column("core", sa.LargeBinary))
    op.drop_index("outcomes_of_metric", "outcomes")
    op.create_index("outcomes_of_metric", "outcomes", ["model", "metric", "observed_at_us"])


def downgrade() -> None:
    op.drop_index("outcomes_of_metric", "outcomes")
    op.create_index("outcomes_of_metric", "outcomes", ["model", "metric"])
    op.drop_column("inbox", "core")
