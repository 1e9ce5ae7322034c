"""Processes of the release before know nothing of rows drawn from others, and go on writing while a new one
starts: what lacks the number is about every row."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.alter_column("windows", "sampled_rows", nullable=True)
    op.alter_column("alerts", "window_sampled_rows", nullable=True)
