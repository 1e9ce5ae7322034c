"""Engines whose every connection sees one schema only."""

from __future__ import annotations

import asyncio

from sqlalchemy import event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from services.common.db.address import address, connect_timeout, within_address
from services.common.errors import Unavailable

_CONNECT_S = 5.0
_STATEMENT_S = 30.0
_POOL_WAIT_S = 10.0


class DatabaseUnavailable(Unavailable):
    """PostgreSQL cannot be reached or has no connection to spare."""


def engine(
    database_url: str, schema: str, *, pool_size: int = 10, statement_timeout_s: float = _STATEMENT_S
) -> AsyncEngine:
    """A pool of at most `pool_size` connections with `search_path = schema`. Connecting takes 5 s at most,
    or what the address says, a statement `statement_timeout_s`, waiting for a connection 10 s. Connections
    that PostgreSQL closed meanwhile are replaced before use. Dispose of it with `await engine.dispose()`."""
    url, given = address(database_url)
    pooled = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=_POOL_WAIT_S,
        pool_recycle=1800,
        connect_args=connect_args(schema, statement_timeout_s, given),
    )
    event.listen(pooled.sync_engine, "checkout", _replace_if_closed)
    return pooled


def _replace_if_closed(connection: DBAPIConnection, _record: object, _proxy: object) -> None:
    """The loop sees at once when the server closes a connection, so nobody needs to be asked (SQLAlchemy's
    `pool_pre_ping` takes three round trips for every transaction)."""
    if connection.driver_connection.is_closed():
        raise InvalidatePoolError("The server has closed the connection.")


def unpooled_engine(database_url: str, schema: str) -> AsyncEngine:
    """An engine that opens a connection per use, without a statement timeout: migrations and long-lived
    locks."""
    url, given = address(database_url)
    return create_async_engine(url, poolclass=NullPool, connect_args=connect_args(schema, 0, given))


def connect_args(schema: str, statement_timeout_s: float, given: dict[str, str]) -> dict[str, object]:
    """What asyncpg is told about each connection, beside the address; `given` are parameters of this."""
    return {
        "dsn": within_address(given),
        "timeout": connect_timeout(given, _CONNECT_S),
        "server_settings": {
            "search_path": schema,
            "application_name": given.get("application_name", f"headrace-{schema}"),
            "statement_timeout": str(round(statement_timeout_s * 1000)),
            "timezone": "UTC",
        },
    }


async def check_database(of: AsyncEngine, within_s: float = 2.0) -> None:
    """Raise DatabaseUnavailable unless a trivial statement is answered within `within_s`."""
    try:
        async with asyncio.timeout(within_s), of.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except (DBAPIError, OSError, TimeoutError) as error:
        raise DatabaseUnavailable("The database does not answer.", retry_after_ms=1000) from error
