"""The unit of work: one session, one transaction, ended at the edge that began it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from services.common.db.engine import DatabaseUnavailable
from services.common.errors import Aborted

#: After these SQLSTATEs the same transaction may succeed: serialization, deadlock, lock not available.
_RETRYABLE = {"40001", "40P01", "55P03"}


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    """Commit when the block ends, roll back when it raises.

    Objects stay readable after the commit. Raises DatabaseUnavailable where the connection is lost or none
    is to be had, Aborted where a concurrent transaction won; integrity errors come as SQLAlchemy raises
    them.
    """
    try:
        async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
            yield session
    except PoolTimeout as error:
        raise DatabaseUnavailable("Every database connection is in use.", retry_after_ms=1000) from error
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) in _RETRYABLE:
            raise Aborted("Somebody else changed the same data at the same time; try again.") from error
        if error.connection_invalidated or _is_connection_error(error):
            raise DatabaseUnavailable("The database does not answer.", retry_after_ms=1000) from error
        raise
    except (ConnectionError, TimeoutError) as error:
        raise DatabaseUnavailable("The database does not answer.", retry_after_ms=1000) from error


def _is_connection_error(error: DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None) or ""
    # 08: connection exceptions, 57P0x: the server shuts down or starts, 53300: too many connections.
    lost = state.startswith(("08", "57P0")) or state == "53300"
    return lost or (isinstance(error, InterfaceError | OperationalError) and not state)
