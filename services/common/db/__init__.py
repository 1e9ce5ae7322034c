"""PostgreSQL through SQLAlchemy 2 on asyncpg. address.py and engine.py: pools bound to one schema.
transaction.py: the unit of work. migrate.py: Alembic at start, safe with replicas. outbox.py: rows that
become Kafka records. claims.py: records that were taken in before."""

from services.common.db.claims import ClaimRow, claim, claimed, forget_claims
from services.common.db.engine import DatabaseUnavailable, check_database, engine
from services.common.db.migrate import migrate
from services.common.db.outbox import OutboxRelay, OutboxRow, enqueue, outbox_columns
from services.common.db.transaction import is_refused, transaction

__all__ = [
    "ClaimRow",
    "DatabaseUnavailable",
    "OutboxRelay",
    "OutboxRow",
    "check_database",
    "claim",
    "claimed",
    "engine",
    "enqueue",
    "forget_claims",
    "is_refused",
    "migrate",
    "outbox_columns",
    "transaction",
]
