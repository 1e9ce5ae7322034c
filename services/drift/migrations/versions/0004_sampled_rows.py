"""How many rows of a window were looked at. So far that was every one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table, column, rows in (
        ("windows", "sampled_rows", "rows"),
        ("alerts", "window_sampled_rows", "window_rows"),
    ):
        op.add_column(table, sa.Column(column, sa.BigInteger))
        op.execute(f"UPDATE {table} SET {column} = {rows}")  # noqa: S608 - names of this file only
        op.alter_column(table, column, nullable=False)
