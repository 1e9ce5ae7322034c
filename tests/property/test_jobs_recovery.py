"""Jobs under random faults, on a real PostgreSQL: gateways die between any two steps, the broker loses what
it holds, results come late, twice or never. Each chunk counts once, and every job ends."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from headrace.v1.batch_pb2 import BatchChunk, BatchChunkResult
from headrace.v1.tensor_pb2 import Code
from prometheus_client import CollectorRegistry
from sqlalchemy import select

from services.common.bus import Record, Standing
from services.common.clock import ManualClock
from services.common.db import engine, migrate, transaction
from services.common.errors import HeadraceError, Unavailable
from services.common.objects import ArtifactStore, InputSources
from services.common.topics import JOB_RESULTS, Topic
from services.gateway.catalogue import Catalogue
from services.gateway.jobs.addresses import CallbackRules
from services.gateway.jobs.backend import Availability, Backend
from services.gateway.jobs.consumers import NOBODY, ChunkResults
from services.gateway.jobs.controller import Controller
from services.gateway.jobs.losses import Losses
from services.gateway.jobs.metrics import JobMetrics
from services.gateway.jobs.publishing import ChunkPublisher
from services.gateway.jobs.service import JobLimits, JobService
from services.gateway.jobs.specs import JobSpec
from services.gateway.jobs.tables import ChunkRow, JobRow
from services.gateway.jobs.watching import Watching
from services.gateway.pools import Pools
from tests.fixtures.gateway import configs
from tests.fixtures.jobs import StandInWorker, numbers, parquet_of
from tests.fixtures.waiting import eventually

MIGRATIONS = Path("services/gateway/migrations")


class Crash(BaseException):
    """The process dies here."""


@dataclass
class UnreliableBroker:
    """Keeps chunks until they are taken; may lose them, take some of what is published, or kill who
    publishes."""

    rng: random.Random
    is_faulty: bool = True
    chunks: list[BatchChunk] = field(default_factory=list)
    given: int = 0

    async def publish(self, records: Sequence[Record]) -> None:
        fate = self.rng.random() if self.is_faulty else 1.0
        arrived = records if fate >= 0.2 else records[: self.rng.randrange(len(records) + 1)]
        for record in arrived:
            if record.topic.startswith("batch.chunks."):
                assert record.value is not None
                self.given += 1
                self.chunks.append(BatchChunk.FromString(record.value))
        if fate < 0.1:
            raise Unavailable("The broker does not answer.")
        if fate < 0.25:
            raise Crash

    async def standings(self, wanted: Sequence[tuple[Topic, str]]) -> list[Standing | None]:
        chunks = Standing(self.given, len(self.chunks))
        return [chunks if topic.name != JOB_RESULTS.name else Standing(0, 0) for topic, _ in wanted]


@dataclass
class World:
    """Everything that outlives a gateway, and the gateways that live."""

    rng: random.Random
    clock: ManualClock
    backend: Backend
    broker: UnreliableBroker
    service: JobService
    results: ChunkResults
    worker: StandInWorker
    made: int = 0
    gateways: list[tuple[Controller, Losses]] = field(default_factory=list)
    late: list[BatchChunkResult] = field(default_factory=list)

    def start(self) -> None:
        """One more gateway."""
        self.made += 1
        metrics = JobMetrics(CollectorRegistry())
        bus: Any = self.broker

        async def no_topics(_topics: Sequence[Topic]) -> None:
            return

        publisher = ChunkPublisher(bus, no_topics, 4, self.clock)
        pools = Pools(self.clock)
        controller = Controller(
            f"gateway-{self.made}", self.backend, publisher, pools, self.clock, metrics, lambda _job: None
        )
        losses = Losses(self.backend, publisher, controller, self.clock, metrics, lambda _job: None)
        self.gateways.append((controller, losses))

    async def tick(self) -> None:
        """A gateway does what is next, and may die of it."""
        place = self.rng.randrange(len(self.gateways))
        controller, losses = self.gateways[place]
        try:
            await controller.tick()
            await eventually(lambda: not controller.cutting)
            await losses.look()
        except HeadraceError:
            return
        except Crash:
            del self.gateways[place]
            self.start()

    async def work(self) -> None:
        """A worker does any chunk, and its result comes at once, later, twice or never."""
        if not self.broker.chunks:
            return
        chunk = self.broker.chunks.pop(self.rng.randrange(len(self.broker.chunks)))
        fate = self.rng.random() if self.broker.is_faulty else 1.0
        if fate < 0.05:
            result = BatchChunkResult(code=Code.CODE_INTERNAL, message="It broke.")
        elif fate < 0.1:
            result = BatchChunkResult(code=Code.CODE_CANCELLED)
        else:
            result = await self.worker.work(chunk)
        result.job_id, result.index, result.attempt = chunk.job_id, chunk.index, chunk.attempt
        if fate < 0.2:
            return  # the worker died before it said so
        if fate < 0.4:
            self.late.append(result)
        if not 0.2 <= fate < 0.3:
            await self.tell([result] * (2 if fate < 0.5 else 1))

    async def tell(self, results: Sequence[BatchChunkResult]) -> None:
        await self.results(
            [Record(JOB_RESULTS.name, b"", one.SerializeToString(), (), 0, 0) for one in results]
        )

    async def step(self) -> None:
        """Anything may happen."""
        await self.rng.choices(
            [self.tick, self.work, self._late, self._lose, self._wait, self._second], [8, 12, 2, 0.4, 2, 0.4]
        )[0]()

    async def _late(self) -> None:
        self.rng.shuffle(self.late)
        told, self.late = self.late[:3], self.late[3:]
        if told:
            await self.tell(told)

    async def _lose(self) -> None:
        self.broker.chunks.clear()

    async def _wait(self) -> None:
        self.clock.advance(self.rng.choice([0.1, 1, 4, 20]))

    async def _second(self) -> None:
        if len(self.gateways) < 3:
            self.start()


@asynccontextmanager
async def world(database_url: str, folder: Path, seed: int) -> AsyncIterator[World]:
    rng, clock = random.Random(seed), ManualClock()
    await migrate(database_url, "gateway", MIGRATIONS)
    store = ArtifactStore(f"file://{folder}/artifacts")
    sources = InputSources(store, ("store://files/", f"file://{folder}/"))
    backend = Backend(engine(database_url, "gateway"), store, sources)
    availability = Availability(is_configured=True)
    availability.open(backend)
    catalogue = Catalogue()
    for config in configs():
        catalogue.apply(config.model.encode(), config.SerializeToString())
    broker = UnreliableBroker(rng)
    bus: Any = broker
    service = JobService(
        availability=availability,
        catalogue=catalogue,
        pools=Pools(clock),
        rules=CallbackRules(()),
        watching=Watching(availability, clock),
        changed=lambda _job: None,
        clock=clock,
        limits=JobLimits(),
    )
    metrics = JobMetrics(CollectorRegistry())
    results = ChunkResults(availability, clock, metrics, lambda _job: None, lambda: None)
    worker = StandInWorker(bus, store, sources)
    made = World(rng, clock, backend, broker, service, results, worker)
    made.start()
    yield made
    await backend.engine.dispose()
    await sources.close()
    await store.close()


@pytest.mark.parametrize("seed", range(8))
async def test_each_chunk_counts_once_and_every_job_ends(
    seed: int, database_url: str, tmp_path: Path
) -> None:
    async with world(database_url, tmp_path, seed) as here:
        rng = here.rng
        values = {name: [float(v) for v in numbers(rng.choice([0, 1, 700, 9000]), seed)] for name in "abcd"}
        for name, column in values.items():
            (tmp_path / f"{name}.parquet").write_bytes(parquet_of(column, group_rows=rng.choice([50, 1000])))
            spec = JobSpec("cancer", input_uri=f"file://{tmp_path}/{name}.parquet", job_id=name)
            await here.service.submit(spec, NOBODY)
        cancelled = rng.choice("abcd") if rng.random() < 0.5 else None
        for number in range(120):
            if number == 40 and cancelled is not None:
                try:
                    await here.service.cancel(cancelled, NOBODY)
                except HeadraceError:
                    cancelled = None  # it was faster
            await here.step()
        # From here on nothing goes wrong: what was left must be mended.
        here.broker.is_faulty = False
        for _ in range(400):
            async with transaction(here.backend.engine) as session:
                left = (await session.scalars(select(JobRow).where(JobRow.ended_at.is_(None)))).all()
            if not left:
                break
            await here.tick()
            while here.broker.chunks:
                await here.work()
            here.clock.advance(4)
        assert not left, [(job.job_id, job.state, job.open_chunks, job.flying_chunks) for job in left]
        await here.tell(
            here.late or [BatchChunkResult(job_id="a")]
        )  # whatever comes after the end changes nothing
        for name, column in values.items():
            await check(here, name, column, is_cancelled=name == cancelled)


async def check(here: World, name: str, column: list[float], *, is_cancelled: bool) -> None:
    job = await here.service.get(name, NOBODY)
    async with transaction(here.backend.engine) as session:
        found = select(ChunkRow).where(ChunkRow.job_id == name).order_by(ChunkRow.index)
        chunks = (await session.scalars(found)).all()
    assert job.state == ("cancelled" if is_cancelled else "completed"), (name, job)
    done = [chunk for chunk in chunks if chunk.state == "done"]
    assert job.completed == sum(chunk.rows_done for chunk in done)
    assert job.failed == sum(chunk.rows_failed for chunk in done)
    assert {chunk.state for chunk in chunks} <= {"done", "dropped"}
    answers: dict[int, float] = {}
    async for batch in here.service.result_batches(job):
        for row, value in zip(*(batch.column(at).to_pylist() for at in ("row", "doubled")), strict=True):
            assert row not in answers
            answers[row] = value
    failed = [error["row"] async for errors in here.service.error_rows(job) for error in errors]
    assert len(answers) == job.completed
    assert len(failed) == job.failed == len(set(failed))
    assert all(answers[row] == 2 * column[row] for row in answers)
    if not is_cancelled:
        assert job.total == len(column)
        assert [chunk.state for chunk in chunks] == ["done"] * len(chunks)
        assert sorted([*answers, *failed]) == list(range(len(column)))
