"""Alembic at start: the schema is brought to its newest revision before the service serves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.util.exc import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.db.engine import unpooled_engine
from services.common.errors import Fatal

log = structlog.get_logger(__name__)

_ENVIRONMENT = Path(__file__).parent / "alembic"
_VERSION_TABLE = "schema_version"
_RETRY_S = 0.3
# One lock for all schemas of a database: Alembic keeps its context in module globals, so two upgrades must
# not interleave in one process either.
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('headrace:migrate', 0))")


async def migrate(
    database_url: str,
    schema: str,
    script_location: str | Path,
    *,
    connect_within_s: float = 30.0,
    within_s: float = 300.0,
) -> None:
    """Create `schema` if needed and upgrade it to the newest revision in `<script_location>/versions/*.py`
    (no env.py is needed there; tables are created without naming the schema).

    All revisions run in one transaction, so a failed one changes nothing. Replicas that start together take
    turns under an advisory lock. The version table lies in the schema. Raises Fatal where PostgreSQL is not
    reached within `connect_within_s`, the turn and the upgrade take longer than `within_s`, a revision
    fails, or the schema is newer than the code.
    """
    versions = Path(script_location) / "versions"
    if not versions.is_dir():
        raise Fatal(f"There are no migrations in {versions}.")
    engine = unpooled_engine(database_url, schema)
    try:
        await _reach(engine, connect_within_s)
        async with asyncio.timeout(within_s), engine.begin() as connection:
            await connection.execute(_LOCK)
            await connection.execute(text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
            before, after = await connection.run_sync(_upgrade, schema, versions)
    except TimeoutError:
        raise Fatal(f"Migrating the schema {schema} took longer than {within_s:g} s.") from None
    except CommandError as error:
        raise Fatal(f"The schema {schema} does not fit this program's migrations: {error}.") from error
    except DBAPIError as error:
        raise Fatal(f"A migration of the schema {schema} failed: {error.orig}.") from error
    finally:
        await engine.dispose()
    if before != after:
        log.info("schema_migrated", schema=schema, before=before, after=after)


def _upgrade(connection: Connection, schema: str, versions: Path) -> tuple[str | None, str | None]:
    config = Config()
    config.set_main_option("script_location", str(_ENVIRONMENT).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("version_locations", str(versions).replace("%", "%%"))
    config.attributes.update(connection=connection, schema=schema, version_table=_VERSION_TABLE)
    before = _revision(connection, schema)
    command.upgrade(config, "head")
    return before, _revision(connection, schema)


def _revision(connection: Connection, schema: str) -> str | None:
    options = {"version_table": _VERSION_TABLE, "version_table_schema": schema}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


async def _reach(engine: AsyncEngine, within_s: float) -> None:
    """Return once a connection stands. A refused password or a missing database is final, an absent server
    not."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while True:
        try:
            async with engine.connect():
                return
        except (DBAPIError, OSError, TimeoutError) as error:
            state = getattr(getattr(error, "orig", error), "sqlstate", None) or ""
            where = f"{engine.url.host}:{engine.url.port or 5432}"
            if state.startswith("28") or state == "3D000":
                raise Fatal(f"PostgreSQL at {where} refuses us: {getattr(error, 'orig', error)}.") from error
            if loop.time() + _RETRY_S > deadline:
                raise Fatal(f"PostgreSQL at {where} was not reached in {within_s:g} s: {error}.") from error
            await asyncio.sleep(_RETRY_S)
