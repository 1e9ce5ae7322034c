"""Samples in a binary form, stored as they are: they are written every second, and neither text nor
compression served anybody."""

from __future__ import annotations

import base64
import json

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_SAMPLES = ("reference", "learning", "pane", "panes")


def upgrade() -> None:
    op.add_column(
        "streams", sa.Column("closed", sa.ARRAY(sa.LargeBinary), nullable=False, server_default="{}")
    )
    connection = op.get_bind()
    keys = connection.execute(sa.text("SELECT model, version FROM streams")).all()
    for model, version in keys:
        key = {"model": model, "version": version}
        row = connection.execute(
            sa.text(
                "SELECT reference, learning, pane, panes FROM streams "
                "WHERE model = :model AND version = :version"
            ),
            key,
        ).one()
        connection.execute(
            sa.text(
                "UPDATE streams SET reference = :reference, learning = :learning, pane = :pane, "
                "closed = CAST(:closed AS bytea[]) WHERE model = :model AND version = :version"
            ),
            key
            | {
                "reference": _binary(row.reference) if row.reference else None,
                "learning": _binary(row.learning),
                "pane": _binary(row.pane),
                "closed": [_binary(base64.b64decode(text)) for text in row.panes],
            },
        )
    op.drop_column("streams", "panes")
    op.alter_column("streams", "closed", new_column_name="panes", server_default=None)
    for column in _SAMPLES:
        op.execute(f"ALTER TABLE streams ALTER COLUMN {column} SET STORAGE EXTERNAL")


def _binary(stored: bytes) -> bytes:
    sample = json.loads(stored)
    sketches = [base64.b64decode(text) for text in sample["numeric"].values()]
    sample["numeric"] = [[name, len(data)] for name, data in zip(sample["numeric"], sketches, strict=True)]
    header = json.dumps(sample).encode()
    return b"".join((len(header).to_bytes(4, "big"), header, *sketches))
