"""Outcomes are copied by the driver itself, past SQLAlchemy: what ends that is told like everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.analytics import repository
from services.common.db import DatabaseUnavailable, engine, migrate, transaction

MIGRATIONS = Path("services/analytics/migrations")


async def test_a_copy_that_takes_too_long_is_no_failure_of_ours(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate(database_url, "analytics", MIGRATIONS)
    database = engine(database_url, "analytics", statement_timeout_s=0.5)
    slow = "SELECT pg_sleep(60)::text, $1::text, $2::text, $3::bigint"
    monkeypatch.setattr(repository, "_OUTCOMES", slow)
    try:
        with pytest.raises(DatabaseUnavailable, match="too long"):
            async with transaction(database) as session:
                await repository.outcomes_csv(session, "m")
        async with transaction(database) as session:
            assert await repository.outcomes_of_request(session, bytes(16)) == []
    finally:
        await database.dispose()
