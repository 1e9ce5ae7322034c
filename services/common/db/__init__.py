"""PostgreSQL through SQLAlchemy 2 on asyncpg. engine.py: pools bound to one schema. transaction.py: the
unit of work. migrate.py: Alembic at start, safe with replicas. outbox.py: rows that become Kafka
records."""

from services.common.db.engine import DatabaseUnavailable, check_database, engine
from services.common.db.migrate import migrate
from services.common.db.outbox import OutboxRelay, OutboxRow, enqueue, outbox_columns
from services.common.db.transaction import is_refused, transaction

__all__ = [
    "DatabaseUnavailable",
    "OutboxRelay",
    "OutboxRow",
    "check_database",
    "engine",
    "enqueue",
    "is_refused",
    "migrate",
    "outbox_columns",
    "transaction",
]
