"""Engines whose every connection sees one schema only."""

from __future__ import annotations

import asyncio

from sqlalchemy import event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from services.common.errors import Fatal, Unavailable

_CONNECT_S = 5.0
_STATEMENT_S = 30.0
_POOL_WAIT_S = 10.0


class DatabaseUnavailable(Unavailable):
    """PostgreSQL cannot be reached or has no connection to spare."""


def engine(
    database_url: str, schema: str, *, pool_size: int = 10, statement_timeout_s: float = _STATEMENT_S
) -> AsyncEngine:
    """A pool of at most `pool_size` connections with `search_path = schema`. Connecting takes 5 s at most,
    a statement `statement_timeout_s`, waiting for a connection 10 s. Connections that PostgreSQL closed
    meanwhile are replaced before use. Dispose of it with `await engine.dispose()`."""
    pooled = create_async_engine(
        asyncpg_url(database_url),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=_POOL_WAIT_S,
        pool_recycle=1800,
        connect_args=connect_args(schema, statement_timeout_s),
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
    args = connect_args(schema, 0)
    return create_async_engine(asyncpg_url(database_url), poolclass=NullPool, connect_args=args)


def asyncpg_url(database_url: str) -> URL:
    """`postgresql://…` for the driver used here. Raises Fatal where it is no address."""
    try:
        url = make_url(database_url).set(drivername="postgresql+asyncpg")
    except ArgumentError:
        raise Fatal(
            "DATABASE_URL is not of the form postgresql://user:password@host:port/database."
        ) from None
    # How libpq calls it, and so whoever lends databases; as an argument the driver knows it by another name.
    if (mode := url.query.get("sslmode")) is not None:
        url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": mode})
    return url


def connect_args(schema: str, statement_timeout_s: float) -> dict[str, object]:
    """What asyncpg is told about each connection."""
    return {
        "timeout": _CONNECT_S,
        "server_settings": {
            "search_path": schema,
            "application_name": f"headrace-{schema}",
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
