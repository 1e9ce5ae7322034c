"""What Alembic runs: `migrate` hands it an open connection, in a transaction, with the schema first in its
path."""

from __future__ import annotations

from alembic import context

attributes = context.config.attributes
context.configure(
    connection=attributes["connection"],
    version_table=attributes["version_table"],
    version_table_schema=attributes["schema"],
)
context.run_migrations()
