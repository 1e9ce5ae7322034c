"""Which alerts are due at webhooks, by a clock that may be set back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from services.common.db import engine, migrate, transaction
from services.drift import repository
from services.drift.tables import DeliveryRow, WebhookRow

MIGRATIONS = Path("services/drift/migrations")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def test_what_was_put_off_before_the_clock_was_set_back_is_due(database_url: str) -> None:
    await migrate(database_url, "drift", MIGRATIONS)
    database = engine(database_url, "drift")
    try:
        async with transaction(database) as session:
            session.add(WebhookRow(webhook_id=b"w", url="http://receiver", model="", created_at=NOW))
            await session.flush()
            for attempts, put_off_s in ((0, 0), (1, 30), (5, 16), (13, 3600)):
                session.add(
                    DeliveryRow(
                        webhook_id=b"w",
                        body={"attempts": attempts},
                        attempts=attempts,
                        next_at=NOW + timedelta(seconds=put_off_s),
                        delivered_at=None,
                        error=None,
                    )
                )

        async def due(now: datetime) -> list[int]:
            async with transaction(database) as session:
                return [row.attempts for row in await repository.due_deliveries(session, now, 10)]

        assert await due(NOW) == [0]
        assert await due(NOW - timedelta(seconds=60)) == []  # clocks of two replicas
        assert await due(NOW - timedelta(hours=1)) == [0, 5, 1, 13]
        assert await due(NOW + timedelta(hours=1)) == [0, 5, 1, 13]
    finally:
        await database.dispose()
