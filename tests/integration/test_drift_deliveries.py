"""Which alerts are due at webhooks, by a clock that may be set back; and what becomes of a post."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from services.common.clock import ManualClock
from services.common.db import engine, migrate, transaction
from services.drift import repository
from services.drift.metrics import Metrics
from services.drift.tables import DeliveryRow, WebhookRow
from services.drift.webhooks import WebhookSender
from tests.fixtures.waiting import eventually_of

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


async def posted(
    database_url: str, url: str, attempts: int = 0, registry: CollectorRegistry | None = None
) -> DeliveryRow:
    """What is known of a delivery to `url` that was tried so often before, after one more try; `registry` is
    what counts it."""
    await migrate(database_url, "drift", MIGRATIONS)
    database = engine(database_url, "drift")
    clock = ManualClock()
    now = clock.now()
    row = DeliveryRow(webhook_id=b"w", body={}, attempts=attempts, next_at=now, delivered_at=None, error=None)

    async def seen() -> DeliveryRow:
        async with transaction(database) as session:
            return await session.get_one(DeliveryRow, row.id)

    try:
        async with transaction(database) as session:
            session.add(WebhookRow(webhook_id=b"w", url=url, model="", created_at=now))
            await session.flush()
            session.add(row)
        async with WebhookSender(database, clock, Metrics(registry or CollectorRegistry())):
            return await eventually_of(seen, lambda one: bool(one.delivered_at or one.error))
    finally:
        await database.dispose()


async def test_an_answer_without_end_is_an_answer(database_url: str) -> None:
    """Its status says all; what comes behind it would fill the memory for as long as a post may take."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n")
        try:
            while True:
                writer.write(bytes(1000))
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        row = await posted(database_url, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        assert (row.attempts, row.error) == (1, None)


async def test_the_log_does_not_tell_how_to_post_there(database_url: str) -> None:
    registry = CollectorRegistry()
    with capture_logs() as logs:
        row = await posted(database_url, "http://user:pass@127.0.0.1:1/services/secret?token=t", 23, registry)
    assert (row.error or "").startswith("given up")
    (given_up,) = (line for line in logs if line["event"] == "webhook_given_up")
    assert given_up["host"] == "127.0.0.1"
    counted = {
        outcome: registry.get_sample_value("headrace_drift_deliveries_total", {"outcome": outcome})
        for outcome in ("delivered", "failed", "given_up")
    }
    assert counted == {"delivered": 0, "failed": 0, "given_up": 1}
    assert not any(secret in str(logs) for secret in ("secret", "pass", "token"))
