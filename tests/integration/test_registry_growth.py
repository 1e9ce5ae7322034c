"""What the registry asks of a database with many trials and versions that are over reads few of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.db import engine, migrate, transaction
from services.registry.repository import Repository

MANY = 3000
CLOSED = datetime(2026, 1, 1, tzinfo=UTC)
#: The newest five are open; number n of the others was closed n minutes after the first of January.
_FILL = (
    "INSERT INTO models (name, description, tags, created_at) VALUES ('m', '', '{}', now())",
    """
    INSERT INTO experiments (experiment_id, model, status, revision, spec, layer, buckets, waiting_for,
                             created_at, stopped_because, closed_at)
    SELECT 'e' || lpad(n::text, 6, '0'), 'm', CASE WHEN n > :open THEN 'running' ELSE 'stopped' END, n, '{}',
           '[]', '[]', '', now(), '',
           CASE WHEN n <= :open THEN CAST(:closed AS timestamptz) + n * interval '1 minute' END
    FROM generate_series(1, :many) AS n
    """,
    """
    INSERT INTO rollouts (rollout_id, model, version, previous_version, status, step, promoted, revision,
                          spec, before, decided, reason, started_at, finished_at, closed_at, paused_at)
    SELECT 'r' || lpad(n::text, 6, '0'), 'm', '2', '1',
           CASE WHEN n > :open THEN 'running' ELSE 'completed' END,
           0, false, n, '{}', '', '', '', now(), now(),
           CASE WHEN n <= :open THEN CAST(:closed AS timestamptz) + n * interval '1 minute' END,
           CASE WHEN n = :many THEN now() END
    FROM generate_series(1, :many) AS n
    """,
    """
    INSERT INTO versions (model, version, backend, artifact_digest, artifact_bytes, signature, files, metrics,
                          lineage, tags, created_at)
    SELECT 'm', n::text, 'onnx', 'd', 1, '', '[]', '{}', '{}', '{}', now() + n * interval '1 second'
    FROM generate_series(1, :many) AS n
    """,
)


@asynccontextmanager
async def filled(database_url: str) -> AsyncIterator[AsyncEngine]:
    await migrate(database_url, "registry", Path("services/registry/migrations"))
    database = engine(database_url, "registry")
    try:
        async with transaction(database) as session:
            for statement in _FILL:
                given = {"many": MANY, "open": MANY - 5, "closed": CLOSED}
                used = {name: value for name, value in given.items() if f":{name}" in statement}
                await session.execute(text(statement), used)
            for table in ("experiments", "rollouts", "versions"):
                await session.execute(text(f"ANALYZE {table}"))
        yield database
    finally:
        await database.dispose()


async def rows_read(database: AsyncEngine, ask: Callable[[Repository], Awaitable[Any]]) -> int:
    """How many rows or index entries the statements of `ask` look at."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_others: Any) -> None:
        asked.append((statement, parameters))

    async with transaction(database) as session:
        event.listen(database.sync_engine, "before_cursor_execute", note)
        try:
            await ask(Repository(session))
        finally:
            event.remove(database.sync_engine, "before_cursor_execute", note)
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        total = 0
        for statement, parameters in asked:
            explained = await driver.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", *parameters)
            total += _looked_at(explained[0]["Plan"])
        return total


def _looked_at(plan: dict[str, Any]) -> int:
    own = 0
    if "Relation Name" in plan or "Index Name" in plan:
        seen = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
        own = round(seen * plan["Actual Loops"])
    return own + sum(_looked_at(part) for part in plan.get("Plans", ()))


async def test_lists_and_looks_read_no_more_than_they_show(database_url: str) -> None:
    async with filled(database_url) as database:
        before = CLOSED + timedelta(minutes=3, seconds=30)
        asked: list[Callable[[Repository], Awaitable[Any]]] = [
            lambda tx: tx.experiments(None, ["running"], "", 101),
            lambda tx: tx.experiments(None, ["scheduled"], "", 101),
            lambda tx: tx.rollouts(None, "running", "", 101),
            lambda tx: tx.rollouts(None, "paused", "", 101),
            lambda tx: tx.trials_closed_before(before),
            lambda tx: tx.open_rollouts(),
            lambda tx: tx.versions_behind("m", None, 11),
        ]
        read = [await rows_read(database, ask) for ask in asked]
        assert max(read) <= 50, read


async def test_what_was_closed_first_is_forgotten_first(database_url: str) -> None:
    async with filled(database_url) as database, transaction(database) as session:
        tx = Repository(session)
        some = await tx.trials_closed_before(CLOSED + timedelta(days=365))
        assert len(some) == 100
        assert some[:4] == ["e000001", "r000001", "e000002", "r000002"]
        revisions = await tx.trial_revisions()
        assert len(revisions) == 2 * MANY
        assert (revisions["e000007"], revisions["r000008"]) == (7, 8)
        assert await tx.key_revisions() == {}
