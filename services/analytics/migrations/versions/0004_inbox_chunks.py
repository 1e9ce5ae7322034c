"""The inbox in chunks of records, objects noted before they are written, and who of several replicas keeps
house."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)

# A chunk of one record, as `chunks.pack` writes it.
_MOVE = """
INSERT INTO inbox (model, version, records, rows, received_at, request_ids, value, core)
SELECT model, version, 1, rows, received_at, request_ids,
       int4send(1) || int4send(octet_length(value)) || value,
       int4send(1) || int4send(octet_length(core)) || core
FROM records ORDER BY received_at
"""


def upgrade() -> None:
    op.rename_table("inbox", "records")
    op.create_table(
        "inbox",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("records", sa.Integer, nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("received_at", TIME, nullable=False),
        sa.Column("request_ids", sa.LargeBinary, nullable=False),
        sa.Column("value", sa.LargeBinary, nullable=False),
        sa.Column("core", sa.LargeBinary),
    )
    # They stay for seconds; compressing them would take longer than writing them.
    for column in ("request_ids", "value", "core"):
        op.execute(f"ALTER TABLE inbox ALTER COLUMN {column} SET STORAGE EXTERNAL")
    op.execute(_MOVE)
    op.drop_table("records")
    op.create_index("inbox_of_version", "inbox", ["model", "version"])
    op.create_table(
        "written",
        sa.Column("object", sa.Text, primary_key=True),
        sa.Column("since", TIME, nullable=False, index=True),
        sa.Column("given_up", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("holder", sa.LargeBinary, nullable=False),
        sa.Column("until", TIME, nullable=False),
    )
    live, dropped = sa.text("dropped_at IS NULL"), sa.text("dropped_at IS NOT NULL")
    op.create_index("segments_by_time", "segments", ["last_at_us"], postgresql_where=live)
    op.create_index("segments_dropped", "segments", ["dropped_at"], postgresql_where=dropped)
    op.create_index("outcomes_by_time", "outcomes", ["received_at"])
