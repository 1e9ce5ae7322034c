"""While a release is brought in, processes of the one before go on with the schema of the new one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import select

from services.common.clock import SystemClock
from services.common.db import engine, migrate, transaction
from services.drift.tables import AlertRow, WindowRow
from services.gateway.jobs.tables import FileRow
from tests.fixtures.older_schemas import MIGRATIONS, migrated_to, revisions

#: The oldest revision whose programs may still run beside the newest. It only grows: one release is enough.
OLDEST = {"analytics": "0004", "drift": "0003", "gateway": "0001", "registry": "0001"}

_COLUMNS = """
    SELECT table_name || '.' || column_name, table_name, udt_name,
           is_nullable = 'YES' OR column_default IS NOT NULL OR is_identity = 'YES' OR is_generated = 'ALWAYS'
    FROM information_schema.columns WHERE table_schema = $1
"""
_RULES = """
    SELECT relname || ': ' || pg_get_constraintdef(con.oid), relname::text
    FROM pg_constraint con JOIN pg_class ON pg_class.oid = conrelid
    WHERE connamespace = $1::text::regnamespace AND contype IN ('c', 'f', 'p', 'u', 'x')
    UNION
    SELECT indexdef, tablename::text FROM pg_indexes
    WHERE schemaname = $1::text AND indexdef LIKE 'CREATE UNIQUE%'
"""


@asynccontextmanager
async def connected(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    try:
        yield connection
    finally:
        await connection.close()


async def described(
    database_url: str, schema: str
) -> tuple[dict[str, tuple[str, str, bool]], dict[str, str]]:
    """Each column with its table, its type and whether a row may leave it out; each rule with its table."""
    async with connected(database_url) as connection:
        columns = {name: tuple(rest) for name, *rest in await connection.fetch(_COLUMNS, schema)}
        return columns, dict(await connection.fetch(_RULES, schema))


@pytest.mark.parametrize("schema", sorted(MIGRATIONS))
async def test_what_the_release_before_writes_and_reads_is_still_taken(
    database_url: str, tmp_path: Path, schema: str
) -> None:
    older = {}
    for revision in revisions(schema):
        await migrated_to(database_url, schema, tmp_path, revision)
        if revision >= OLDEST[schema]:
            older[revision] = await described(database_url, schema)
    newest, rules = older[revisions(schema)[-1]]
    for revision, (columns, known) in older.items():
        tables = {table for table, _, _ in columns.values()}
        for name, (_, kind, optional) in columns.items():
            assert name in newest, f"programs of {schema} {revision} name {name}, which is gone"
            assert newest[name][1] == kind, f"programs of {schema} {revision} know {name} as {kind}"
            assert newest[name][2] or not optional, f"programs of {schema} {revision} may leave out {name}"
        for name, (table, _, optional) in newest.items():
            known_to_it = name in columns or table not in tables
            assert known_to_it or optional, f"programs of {schema} {revision} do not name {name} in {table}"
        for rule, table in rules.items():
            assert rule in known or table not in tables, f"programs of {schema} {revision} do not keep {rule}"


async def test_what_older_drift_writes_is_about_every_row(database_url: str) -> None:
    await migrate(database_url, "drift", MIGRATIONS["drift"])
    async with connected(database_url) as connection:
        await connection.execute(
            "INSERT INTO drift.windows (model, version, start_us, end_us, rows, reference_rows, severity, "
            "features, created_at) VALUES ('cancer', '1', 1, 2, 300, 500, 0, '[]', now())"
        )
        await connection.execute(
            "INSERT INTO drift.alerts (alert_id, model, version, feature, detector, severity, value, "
            "threshold, critical_value, p_value, window_start_us, window_end_us, window_rows, "
            "reference_rows, message, opened_at, updated_at) "
            "VALUES ('a', 'cancer', '1', 'x', 'psi', 1, 1, 1, 1, 0, 1, 2, 300, 500, '', now(), now())"
        )
    database = engine(database_url, "drift")
    try:
        async with transaction(database) as session:
            assert (await session.scalars(select(WindowRow))).one().rows_seen == 300
            assert (await session.scalars(select(AlertRow))).one().rows_seen == 300
    finally:
        await database.dispose()


async def test_a_file_that_an_older_gateway_took_is_there(database_url: str) -> None:
    await migrate(database_url, "gateway", MIGRATIONS["gateway"])
    async with connected(database_url) as connection:
        await connection.execute(
            "INSERT INTO gateway.files (file_id, key_id, purpose, filename, bytes, created_at) "
            "VALUES ('file-a', 'owner', 'batch', 'a.jsonl', 3, now())"
        )
    database = engine(database_url, "gateway")
    try:
        async with transaction(database) as session:
            assert (await session.scalars(select(FileRow))).one().readable(SystemClock().now())
    finally:
        await database.dispose()
