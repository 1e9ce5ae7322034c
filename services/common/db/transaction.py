"""The unit of work: one session, one transaction, ended at the edge that began it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asyncpg.exceptions import QueryCanceledError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from services.common.db.engine import DatabaseUnavailable
from services.common.errors import Aborted

#: After these SQLSTATEs the same transaction may succeed: serialization, deadlock, lock not available.
_RETRYABLE = {"40001", "40P01", "55P03"}

#: The statement timeout of the connection.
_TOO_LONG = "57014"


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    """Commit when the block ends, roll back when it raises.

    Objects stay readable after the commit. Raises DatabaseUnavailable where the connection is lost, none is
    to be had or a statement took too long, Aborted where a concurrent transaction won; integrity errors come
    as SQLAlchemy raises them.
    """
    committing = False
    try:
        async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
            yield session
            committing = True
    except PoolTimeout as error:
        raise DatabaseUnavailable("Every database connection is in use.", retry_after_ms=1000) from error
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) in _RETRYABLE:
            raise Aborted("Somebody else changed the same data at the same time; try again.") from error
        if getattr(error.orig, "sqlstate", None) == _TOO_LONG:
            raise DatabaseUnavailable("The database took too long to answer.", retry_after_ms=1000) from error
        if error.connection_invalidated or _is_connection_error(error):
            raise _unreachable(committing=committing) from error
        raise
    except QueryCanceledError as error:  # of a COPY, which is asked of the driver itself
        raise DatabaseUnavailable("The database took too long to answer.", retry_after_ms=1000) from error
    except (ConnectionError, TimeoutError) as error:
        raise _unreachable(committing=committing) from error


def _unreachable(*, committing: bool) -> DatabaseUnavailable:
    """Whether a commit was made whose answer is lost nobody knows. So nobody is told when to try it again:
    callers do that by themselves where they are."""
    return DatabaseUnavailable("The database does not answer.", retry_after_ms=None if committing else 1000)


def is_refused(error: DBAPIError) -> bool:
    """Whether the data themselves are refused, so that the same statement will fail every time: a value of no
    such type (SQLSTATE class 22, or found by the driver), a constraint (23), a limit of the server (54).

    A unique key (23505) may be gone when the statement comes again.
    """
    state = getattr(error.orig, "sqlstate", None) or ""
    if not state:
        return _is_wrong_value(error)
    return state[:2] in ("22", "23", "54") and state != "23505"


def _is_wrong_value(error: DBAPIError) -> bool:
    """Whether the driver could not encode a value; it says so with an InterfaceError of its own."""
    return isinstance(getattr(error.orig, "__cause__", None), ValueError)


def _is_connection_error(error: DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None) or ""
    # 08: connection exceptions, 57P0x: the server shuts down or starts, 53300: too many connections.
    lost = state.startswith(("08", "57P0")) or state == "53300"
    unknown = isinstance(error, InterfaceError | OperationalError) and not state
    return lost or (unknown and not _is_wrong_value(error))
