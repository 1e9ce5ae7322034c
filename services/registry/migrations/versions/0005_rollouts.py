"""Rollouts and every decision made in them.

Revision ID: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0004"

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "rollouts",
        sa.Column("rollout_id", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("previous_version", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("entered_at", _TIME),
        sa.Column("clock_at", _TIME),
        sa.Column("paused_at", _TIME),
        sa.Column("promoted", sa.Boolean, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("spec", JSONB, nullable=False),
        sa.Column("before", sa.LargeBinary, nullable=False),
        sa.Column("decided", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("shadow_since", _TIME),
        sa.Column("finished_at", _TIME),
        sa.Column("closed_at", _TIME),
    )
    # Whatever the code believes: two that move the weights of one model would undo each other's steps.
    op.create_index(
        "rollouts_unfinished",
        "rollouts",
        ["model"],
        unique=True,
        postgresql_where=sa.text("finished_at IS NULL"),
    )
    op.create_index("rollouts_model", "rollouts", ["model", "rollout_id"])
    op.create_index(
        "rollouts_open", "rollouts", ["rollout_id"], postgresql_where=sa.text("closed_at IS NULL")
    )
    op.create_table(
        "rollout_events",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column(
            "rollout_id",
            sa.Text,
            sa.ForeignKey("rollouts.rollout_id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("cause", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("weight", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("evidence", JSONB, nullable=False),
    )
    op.create_index("rollout_events_rollout", "rollout_events", ["rollout_id", "id"])


def downgrade() -> None:
    op.drop_table("rollout_events")
    op.drop_table("rollouts")
