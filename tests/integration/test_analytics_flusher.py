"""When the flusher looks through the inbox: every two seconds, every five after half a quiet minute; and what
it makes of a clock that was set."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import text

from services import analytics
from services.analytics import flushing, repository
from services.analytics.consumers import Consumers
from services.analytics.flushing import Flusher, SegmentWriter, Sizes
from services.analytics.metrics import Metrics
from services.analytics.segments import SegmentFiles
from services.analytics.signatures import Signatures
from services.common.bus.port import Record
from services.common.clock import ManualClock
from services.common.db import engine, migrate, transaction
from services.common.errors import Unavailable
from services.common.objects import ArtifactStore
from services.common.telemetry import Tracing
from services.common.topics import PREDICTIONS
from tests.fixtures.prediction_log import prediction_batch
from tests.fixtures.waiting import patience


class Rests:
    """`asyncio` as the flusher sees it: it sleeps until the test lets it go on, and so long by its clock."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self._wanted: asyncio.Queue[float] = asyncio.Queue()
        self._over = asyncio.Semaphore(0)
        self._resting = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        self._wanted.put_nowait(seconds)
        await self._over.acquire()

    async def next(self) -> float:
        """How long the flusher rests behind its next look."""
        if self._resting:
            self._clock.advance(self._resting)
            self._over.release()
        async with patience("the flusher's next look"):
            self._resting = await self._wanted.get()
        return self._resting


@asynccontextmanager
async def parts(
    database_url: str, folder: Path, clock: ManualClock
) -> AsyncIterator[tuple[Consumers, Flusher]]:
    """What takes records into the inbox, and what takes them out of it."""
    await migrate(database_url, "analytics", Path(analytics.__path__[0]) / "migrations")
    database, store = engine(database_url, "analytics"), ArtifactStore(f"file://{folder}/store")
    metrics, signatures = Metrics(CollectorRegistry()), Signatures()
    writer = SegmentWriter(database, store, signatures, clock, metrics)
    files = SegmentFiles(store, folder / "cache")
    sizes = Sizes(signature_wait_s=10.0)  # nobody says what the version answers with
    try:
        yield (
            Consumers(database, writer, sizes, clock, Tracing("analytics", 0.0, None), metrics),
            Flusher(database, writer, files, signatures, sizes, clock, metrics),
        )
    finally:
        await store.close()
        await database.dispose()


async def test_it_rests_longer_after_half_a_minute_without_records(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    rests = Rests(clock)
    monkeypatch.setattr(flushing, "asyncio", rests)
    async with parts(database_url, tmp_path, clock) as (consumers, flusher), flusher:
        assert [await rests.next() for _ in range(17)] == [2.0] * 15 + [5.0] * 2
        batch = prediction_batch([1])
        await consumers.on_predictions([Record(PREDICTIONS.name, b"cancer/1", batch.SerializeToString())])
        # It lies there for ten seconds: found after five, seven, nine and eleven.
        assert [await rests.next() for _ in range(4)] == [2.0] * 4
        assert list((tmp_path / "store").rglob("*.parquet"))
        assert [await rests.next() for _ in range(16)] == [2.0] * 14 + [5.0] * 2


_DROPPED = """
INSERT INTO segments (object, model, version, layout, rows, size, first_id, last_id, first_at_us, last_at_us,
                      created_at, dropped_at)
SELECT 'predictions/m/1/' || n || '.parquet', 'm', '1', '', 1, 1, '', '', 0, 0, :at, :at
FROM generate_series(1, 1200) AS n
"""
_CLAIMS = "INSERT INTO claims SELECT int4send(n), :at FROM generate_series(1, 45000) AS n"


async def test_what_is_dropped_faster_is_forgotten_faster(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty versions that are flushed every ten seconds leave five objects a second behind."""
    clock = ManualClock()
    rests = Rests(clock)
    monkeypatch.setattr(flushing, "asyncio", rests)
    database = engine(database_url, "analytics")

    async def left(table: str) -> int:
        async with database.connect() as connection:
            return int((await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one())

    try:
        async with parts(database_url, tmp_path, clock) as (_, flusher):
            async with database.begin() as connection:
                for statement in (_DROPPED, _CLAIMS):
                    await connection.execute(text(statement), {"at": clock.now() - timedelta(days=30)})
            async with flusher:
                assert await rests.next() == 2.0
                assert (await left("segments"), await left("claims")) == (700, 25_000)
                assert [await rests.next() for _ in range(2)] == [2.0] * 2
                assert (await left("segments"), await left("claims")) == (0, 0)
    finally:
        await database.dispose()


async def test_a_clock_set_forward_is_allowed_for_though_the_database_is_away_just_then(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that was asleep: the connection is gone, and what waits for its signature was not waiting."""
    clock = ManualClock()
    async with parts(database_url, tmp_path, clock) as (consumers, flusher):
        batch = prediction_batch([1])
        await consumers.on_predictions([Record(PREDICTIONS.name, b"cancer/1", batch.SerializeToString())])
        clock.set(3600.0)
        with monkeypatch.context() as away:
            away.setattr(repository, "waiting", AsyncMock(side_effect=Unavailable("away")))
            with pytest.raises(Unavailable):
                await flusher.flush_due()
        assert await flusher.flush_due() == 0
        clock.advance(11.0)
        assert await flusher.flush_due() == 1


_SEGMENT = """
INSERT INTO segments (object, model, version, layout, rows, size, first_id, last_id, first_at_us, last_at_us,
                      created_at)
VALUES (:name, 'm', '1', '', :rows, 1, '', '', :first, :last, :at)
"""


async def test_one_request_of_the_future_does_not_hide_those_of_now(
    database_url: str, tmp_path: Path
) -> None:
    """A worker's clock was a year ahead for a moment; what it logged was joined with what came before."""
    clock, database = ManualClock(), engine(database_url, "analytics")
    now_s = clock.unix_us() // 1_000_000
    objects = {
        "poisoned": (200_000, now_s - 90_000, now_s + 365 * 86_400),
        "now": (5000, now_s - 10, now_s),
        "beside": (5000, now_s - 12, now_s - 2),
        "before": (5000, now_s - 20, now_s - 12),
        "older": (5000, now_s - 30, now_s - 20),
    }
    async with parts(database_url, tmp_path, clock):
        async with database.begin() as connection:
            for name, (rows, first, last) in objects.items():
                given = {"name": name, "rows": rows, "first": first * 1_000_000, "last": last * 1_000_000}
                await connection.execute(text(_SEGMENT), given | {"at": clock.now()})
        async with transaction(database) as session:
            found = await repository.newest_segments(session, "m", 100)
            later = clock.now() + timedelta(days=1)
            old = await repository.old_segments(session, later)
    await database.dispose()
    assert [row.object for row in found] == ["poisoned", "now", "beside"]
    assert len(old) == len(objects)  # nothing can have been answered after its object was written
