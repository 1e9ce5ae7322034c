"""What drift asks of its database with many versions, and what it keeps of those that are gone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from headrace.v1.control_pb2 import ServedVersion, ServingConfig
from headrace.v1.events_pb2 import PredictionBatch
from prometheus_client import CollectorRegistry
from sqlalchemy import event, func, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.bus.port import Record
from services.common.clock import ManualClock
from services.common.db import engine, migrate, transaction
from services.common.tasks import running
from services.common.topics import PREDICTIONS
from services.drift import app as wiring
from services.drift import consumers, repository
from services.drift.alerting import Persistence
from services.drift.app import forget_gone
from services.drift.consumers import Limits, PredictionConsumer
from services.drift.endpoints import routes
from services.drift.evaluation import Thresholds
from services.drift.metrics import Metrics
from services.drift.sample import HEAD_BYTES
from services.drift.signatures import Signatures
from services.drift.stream import Cadence
from services.drift.tables import AlertRow, Outbox, SignalRow, StreamRow, WindowRow
from tests.fixtures.waiting import eventually
from tests.integration.test_drift_service import SIGNATURE, prediction

CADENCE = Cadence(reference_rows=200, pane_rows=100, window_panes=1)
NOBODY: Any = SimpleNamespace(wake=lambda: None, enabled=False)


class Watch:
    """Drift on a database of its own, without a broker."""

    def __init__(self, database: AsyncEngine) -> None:
        self.database, self.clock, self.signatures = database, ManualClock(), Signatures()
        limits = Limits(CADENCE, Thresholds(), Persistence(2, 2))
        self.consumer = PredictionConsumer(
            database, self.signatures, NOBODY, limits, self.clock, NOBODY, Metrics(CollectorRegistry())
        )
        self._rng = np.random.default_rng(1)

    def serve(self, *versions: str) -> None:
        served = [ServedVersion(version=version, signature=SIGNATURE) for version in versions]
        self.signatures.apply(b"m", ServingConfig(model="m", versions=served).SerializeToString())

    async def take(self, rows: int, *versions: str, shift: float = 0.0) -> None:
        """One delivery with a record of each."""
        records = []
        for version in versions:
            batch = PredictionBatch.FromString(prediction(self._rng, rows, shift).value or b"")
            batch.model, batch.version = "m", version
            records.append(Record(PREDICTIONS.name, b"m", batch.SerializeToString()))
        await self.consumer.on_predictions(records)

    async def versions_in(self, table: type[StreamRow | WindowRow | SignalRow]) -> set[str]:
        async with transaction(self.database) as session:
            return set(await session.scalars(select(table.version)))

    async def forget(self) -> int:
        """How many versions were forgotten."""
        times = 0
        while await forget_gone(self.database, self.signatures, NOBODY, self.clock):
            times += 1
        return times


@asynccontextmanager
async def watching(database_url: str) -> AsyncIterator[Watch]:
    await migrate(database_url, "drift", Path("services/drift/migrations"))
    database = engine(database_url, "drift")
    try:
        yield Watch(database)
    finally:
        await database.dispose()


@contextmanager
def statements(database: AsyncEngine) -> Iterator[list[str]]:
    """What is asked of `database` meanwhile."""
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_others: Any) -> None:
        asked.append(statement)

    event.listen(database.sync_engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        event.remove(database.sync_engine, "before_cursor_execute", note)


async def test_many_versions_ask_no_more_of_the_database_than_one(database_url: str) -> None:
    async with watching(database_url) as watch:
        many = [str(number) for number in range(20)]
        watch.serve("one", *many)
        await watch.take(200, "one", *many)  # their references
        counts = []
        for versions in (["one"], many):
            with statements(watch.database) as asked:
                await watch.take(50, *versions)
            counts.append(len(asked))
            with statements(watch.database) as asked:
                await watch.take(50, *versions)  # a window of each
            counts.append(len(asked))
        assert counts[2] == counts[0]
        assert counts[3] <= counts[1] + 3  # chance makes a signal or two, which are written
        assert await watch.versions_in(WindowRow) == {"one", *many}


async def test_what_is_always_calm_is_not_remembered(database_url: str) -> None:
    async with watching(database_url) as watch:
        watch.serve("1", "2")
        await watch.take(200, "1", "2")
        for _ in range(2):
            await watch.take(100, "1")
            await watch.take(100, "2", shift=3.0)
        assert await watch.versions_in(SignalRow) == {"2"}
        async with transaction(watch.database) as session:
            assert set(await session.scalars(select(AlertRow.feature))) == {"age"}


async def test_of_each_version_the_newest_windows_are_kept(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "KEPT_WINDOWS", 3)
    monkeypatch.setattr(consumers, "_DROP_AFTER", 1)
    async with watching(database_url) as watch:
        watch.serve("1", "2", "3")
        await watch.take(200, "1", "2", "3")
        await watch.take(200, "3")
        for _ in range(5):
            await watch.take(100, "1", "2")
        counted = select(WindowRow.version, func.count(), func.min(WindowRow.id)).group_by(WindowRow.version)
        async with transaction(watch.database) as session:
            kept = {version: (rows, oldest) for version, rows, oldest in await session.execute(counted)}
        # Of version 3 are numbers 1 and 2, of the others those from 3 on in turn.
        assert kept == {"1": (3, 7), "2": (3, 8), "3": (2, 1)}


async def test_old_windows_are_not_looked_for_at_every_new_one(database_url: str) -> None:
    async with watching(database_url) as watch:
        watch.serve("1")
        await watch.take(200, "1")
        with statements(watch.database) as asked:
            for _ in range(65):
                await watch.take(100, "1")
        assert 1 <= sum("DELETE FROM windows" in statement for statement in asked) <= 2


async def test_of_a_version_that_is_gone_nothing_is_kept_for_ever(database_url: str) -> None:
    async with watching(database_url) as watch:
        watch.serve("gone", "served", "heard")
        everyone = ("gone", "served", "heard")
        await watch.take(200, *everyone)
        await watch.take(100, *everyone, shift=3.0)
        await watch.take(100, *everyone, shift=3.0)
        watch.serve("served")
        watch.clock.advance((repository.KEPT_GONE - timedelta(days=1)).total_seconds())
        await watch.take(10, "heard")  # records that were long on their way
        assert await watch.forget() == 0
        watch.clock.advance(timedelta(days=2).total_seconds())
        assert await watch.forget() == 1
        for table in (StreamRow, WindowRow, SignalRow):
            assert await watch.versions_in(table) == {"served", "heard"}
        async with transaction(watch.database) as session:
            ended = set(
                await session.scalars(select(AlertRow.version).where(AlertRow.resolved_at.is_not(None)))
            )
            told = await session.scalar(select(func.count()).select_from(Outbox))
            alerts = await session.scalar(select(func.count()).select_from(AlertRow)) or 0
        assert ended == {"gone"}
        assert told == alerts + alerts / 3  # each was opened, and a third of them ended

        watch.serve("served", "gone")
        await watch.take(10, "gone")  # it comes back as one that was never seen
        assert await watch.versions_in(StreamRow) == {"gone", "served", "heard"}


async def test_where_no_deployment_is_known_nothing_is_forgotten(database_url: str) -> None:
    async with watching(database_url) as watch:
        watch.serve("1")
        await watch.take(10, "1")
        watch.signatures = Signatures()  # another process, and a broker without its data
        watch.clock.advance((2 * repository.KEPT_GONE).total_seconds())
        assert await watch.forget() == 0


async def test_while_deployments_are_told_one_by_one_nothing_is_forgotten(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a broker that lost its topics: the registry publishes them again."""
    monkeypatch.setattr(wiring, "_HOUSEKEEPING", timedelta(milliseconds=1))
    async with watching(database_url) as watch:
        watch.serve("1", "2")
        await watch.take(10, "1", "2")
        watch.clock.advance((2 * repository.KEPT_GONE).total_seconds())
        watch.signatures, rounds = Signatures(), 0

        async def standings(asked: Sequence[object]) -> list[None]:
            nonlocal rounds
            rounds += 1
            return [None for _ in asked]

        bus: Any = SimpleNamespace(standings=standings)
        relay: Any = SimpleNamespace(wake=lambda: None, oldest_pending_s=0.0)
        table: Any = SimpleNamespace(caught_up=True)
        house = wiring._keep_house(
            watch.database, bus, relay, watch.clock, Metrics(CollectorRegistry()), watch.signatures, table
        )
        async with running(house, "housekeeping"):
            await eventually(lambda: rounds > 1)
            watch.clock.advance(wiring._TOLD_S)  # its registry was away, too
            watch.serve("1")
            known = rounds
            await eventually(lambda: rounds > known + 2)
            assert await watch.versions_in(StreamRow) == {"1", "2"}
            watch.clock.advance(wiring._TOLD_S)

            async def is_forgotten() -> bool:
                return await watch.versions_in(StreamRow) == {"1"}

            await eventually(is_forgotten)


async def test_showing_a_model_reads_the_heads_of_its_samples(database_url: str) -> None:
    async with watching(database_url) as watch:
        watch.serve("1", "2", "3")
        await watch.take(200, "1", "2")
        await watch.take(100, "1", "2", shift=3.0)
        await watch.take(100, "1", "2", shift=3.0)
        await watch.take(30, "3")
        async with transaction(watch.database) as session:
            heads = {
                name: func.substring(getattr(StreamRow, name), 1, HEAD_BYTES)
                for name in ("reference", "learning")
            }
            await session.execute(update(StreamRow).values(**heads))  # whoever reads on, fails
            alert = (await session.scalars(select(AlertRow).where(AlertRow.version == "2").limit(1))).one()
            alert.acknowledged_at = watch.clock.now()
        app = FastAPI()
        app.include_router(routes(watch.database, NOBODY, watch.clock, CADENCE))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://drift") as client:
            with statements(watch.database) as asked:
                answer = await client.get("/v1/drift/models/m")
        assert len(asked) == 1
        first, second, third = answer.json()["versions"]
        assert [shown["reference"]["rows"] for shown in (first, second, third)] == [200, 200, 30]
        assert [shown["reference"]["ready"] for shown in (first, second, third)] == [True, True, False]
        assert first["window"]["rows"] == 100
        assert third["window"] is None
        assert first["open_alerts"] == second["open_alerts"] + 1 > 1
        assert third["open_alerts"] == 0
