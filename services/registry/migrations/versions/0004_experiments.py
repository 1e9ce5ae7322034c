"""Experiments, what happened to them, the last verdict on every trial, and holdouts of models.

Revision ID: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "experiments",
        sa.Column("experiment_id", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, sa.ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("spec", JSONB, nullable=False),
        sa.Column("layer", JSONB, nullable=False),
        sa.Column("buckets", JSONB, nullable=False),
        sa.Column("waiting_for", sa.Text, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("started_at", _TIME),
        sa.Column("weighted_at", _TIME),
        sa.Column("stopped_at", _TIME),
        sa.Column("stopped_because", sa.Text, nullable=False),
        sa.Column("closed_at", _TIME),
    )
    op.create_index("experiments_model", "experiments", ["model"])
    # What the controller looks at twice a second; closed experiments only ever grow in number.
    op.create_index(
        "experiments_open", "experiments", ["experiment_id"], postgresql_where=sa.text("closed_at IS NULL")
    )
    op.create_table(
        "experiment_events",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column(
            "experiment_id",
            sa.Text,
            sa.ForeignKey("experiments.experiment_id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("detail", JSONB, nullable=False),
    )
    op.create_index("experiment_events_experiment", "experiment_events", ["experiment_id", "id"])
    op.create_table(
        "verdicts",
        sa.Column("trial_id", sa.Text, primary_key=True),
        sa.Column("verdict", sa.LargeBinary, nullable=False),
        sa.Column("computed_at", _TIME, nullable=False),
        sa.Column("received_at", _TIME, nullable=False),
    )
    op.add_column("models", sa.Column("holdout", sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("models", "holdout")
    op.drop_table("verdicts")
    op.drop_table("experiment_events")
    op.drop_table("experiments")
