"""What outlives a look at a trial: the largest e-values, and which placebos ever crossed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "trial_maxima",
        sa.Column("trial_id", sa.Text, primary_key=True),
        sa.Column("metric", sa.Text, primary_key=True),
        sa.Column("arm", sa.Text, primary_key=True),
        sa.Column("log_e_harm", sa.Float, nullable=False),
        sa.Column("log_e_safe", sa.Float, nullable=False),
        sa.Column("log_e_better", sa.Float, nullable=False),
    )
    op.create_table(
        "placebos",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("trial_id", sa.Text, primary_key=True),
        sa.Column("looks", sa.BigInteger, nullable=False),
        sa.Column("units", sa.BigInteger, nullable=False),
        sa.Column("crossed", JSONB, nullable=False),
        sa.Column("naive", JSONB, nullable=False),
        sa.Column("salts", sa.Integer, nullable=False),
        sa.Column("looked_at", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("placebos")
    op.drop_table("trial_maxima")
