"""Many jobs of one gateway: each has its turn, whatever the others wait for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import pytest
from headrace.v1.batch_pb2 import BatchChunkResult, InputFormat
from headrace.v1.dataplane_pb2 import Priority
from headrace.v1.tensor_pb2 import Code
from prometheus_client import CollectorRegistry

from services.common.bus import MemoryBus, Record
from services.common.clock import ManualClock
from services.common.db import engine, migrate, transaction
from services.common.errors import Unavailable
from services.common.objects import ArtifactStore, InputSources
from services.common.objects.sources import SourceInfo
from services.common.topics import JOB_RESULTS, Topic
from services.gateway.jobs.backend import Availability, Backend
from services.gateway.jobs.consumers import ChunkResults
from services.gateway.jobs.controller import Controller
from services.gateway.jobs.metrics import JobMetrics
from services.gateway.jobs.publishing import ChunkPublisher
from services.gateway.jobs.repository import JobRepository
from services.gateway.jobs.views import JobError
from services.gateway.pools import Pools

MIGRATIONS = Path("services/gateway/migrations")


class AwaySources(InputSources):
    """Every file is on a store that does not answer."""

    asked = 0

    async def stat(self, uri: str) -> SourceInfo:
        self.asked += 1
        raise Unavailable("The store is away.", field="input_uri")

    async def read(self, uri: str, start: int, end: int, *, etag: str | None = None) -> bytes:
        self.asked += 1
        raise Unavailable("The store is away.", field="input_uri")

    async def open(self, uri: str, *, etag: str | None = None) -> IO[bytes]:
        self.asked += 1
        raise Unavailable("The store is away.", field="input_uri")


class Here:
    """A controller on a real database, which looks when it is told."""

    def __init__(self, backend: Backend, sources: AwaySources, clock: ManualClock) -> None:
        self.backend = backend
        self.sources = sources
        self.clock = clock

        async def no_topics(_topics: Sequence[Topic]) -> None:
            return

        publisher = ChunkPublisher(MemoryBus(), no_topics, 4, clock)
        self.registry = CollectorRegistry()
        self.metrics = JobMetrics(self.registry)
        self.controller = Controller(
            "me", backend, publisher, Pools(clock), clock, self.metrics, lambda _job: None
        )

    async def add(self, *job_ids: str, **changes: Any) -> None:
        """Jobs of three rows that travel with them, unless `changes` say otherwise."""
        async with transaction(self.backend.engine) as session:
            for job_id in job_ids:
                await JobRepository(session).insert(self._row(job_id) | changes)

    async def looks(self, times: int) -> None:
        """Look, and let what was begun end."""
        for _ in range(times):
            await self.controller.tick()
            while self.controller.cutting:  # noqa: ASYNC110 - asked, not told
                await asyncio.sleep(0.005)

    def counted(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    async def state(self, job_id: str) -> str:
        async with transaction(self.backend.engine) as session:
            job = await JobRepository(session).job(job_id)
        assert job is not None
        return job.state

    def _row(self, job_id: str) -> dict[str, Any]:
        now = self.clock.now()
        return {
            "job_id": job_id,
            "key_id": "key",
            "kind": "batch",
            "model": "cancer",
            "version": "1",
            "artifact_digest": "",
            "pool": "default",
            "state": "validating",
            "input_uri": "",
            "inline_input": b'{"x":1}\n{"x":2}\n{"x":3}\n',
            "etag": "",
            "rows": 3,
            "input_format": InputFormat.INPUT_FORMAT_JSON_LINES,
            "output_format": 0,
            "callback_url": "",
            "priority": Priority.PRIORITY_NORMAL,
            "metadata": {},
            "exclude_from_drift": False,
            "exclude_from_experiments": False,
            "run_rows": 0,
            "is_split": False,
            "chunks": 0,
            "open_chunks": 0,
            "flying_chunks": 0,
            "completed": 0,
            "failed": 0,
            "created_at": now,
            "expires_at": now + timedelta(days=1),
            "revision": 1,
            "is_forgotten": False,
        }


@pytest.fixture
async def here(database_url: str, tmp_path: Path) -> AsyncIterator[Here]:
    await migrate(database_url, "gateway", MIGRATIONS)
    store = ArtifactStore(f"file://{tmp_path}/artifacts")
    sources = AwaySources(store, ("store://files/",))
    backend = Backend(engine(database_url, "gateway"), store, sources)
    made = Here(backend, sources, ManualClock())
    yield made
    await backend.engine.dispose()
    await sources.close()
    await store.close()


async def test_jobs_that_only_wait_keep_nobody_out(here: Here) -> None:
    waiting = [f"waits-{number}" for number in range(600)]
    await here.add(*waiting, pool="nobody", is_split=True, chunks=1, flying_chunks=1, priority=1)
    await here.looks(4)
    here.clock.advance(1)
    await here.add("late")
    await here.looks(4)
    assert await here.state("late") == "in_progress"
    assert {job.job_id for job in here.controller.jobs} == {*waiting, "late"}


async def test_a_lease_of_before_the_clock_was_set_back_is_over(here: Here) -> None:
    await here.add("left")
    async with transaction(here.backend.engine) as session:
        await JobRepository(session).claim("dead", here.clock.now(), timedelta(seconds=15), 10)
    await here.looks(2)
    assert await here.state("left") == "validating"
    here.clock.advance(-3600)
    await here.looks(2)
    assert await here.state("left") == "in_progress"


async def test_an_input_that_is_away_is_asked_for_at_growing_distances(here: Here) -> None:
    uri = "store://files/f/x.jsonl"
    await here.add("away", input_uri=uri, inline_input=None, rows=0)
    await here.looks(20)
    assert here.sources.asked == 1
    await here.add("fine")
    await here.looks(2)
    assert await here.state("fine") == "in_progress"
    for asked in (2, 3, 4):
        here.clock.advance(2.0 ** (asked - 2) + 0.1)
        await here.looks(5)
        assert here.sources.asked == asked
    assert await here.state("away") == "validating"


async def test_a_job_that_ended_is_counted_once(here: Here) -> None:
    """Whoever finds it over, and looks again before it knows that somebody ended it."""
    await here.add("wrong", "fine")
    for _ in range(3):
        await here.controller.fail("wrong", JobError(Code.CODE_INVALID_ARGUMENT, "no such column", ""))
    assert await here.state("wrong") == "failed"
    assert here.counted("headrace_batch_jobs_ended_total", state="failed") == 1
    assert here.counted("headrace_batch_jobs_ended_total", state="completed") == 0


async def test_rows_of_a_chunk_that_is_done_again_are_counted_once(here: Here) -> None:
    await here.add("one")
    await here.looks(2)
    availability = Availability(is_configured=True)
    availability.open(here.backend)
    results = ChunkResults(availability, here.clock, here.metrics, lambda _job: None, lambda: None)

    async def said(code: Code, done: int) -> None:
        result = BatchChunkResult(job_id="one", index=0, attempt=1, code=code, rows_done=done)
        await results([Record(JOB_RESULTS.name, b"one/0", result.SerializeToString())])

    # Its worker leaves, and whoever is next begins at the first row.
    await said(Code.CODE_CANCELLED, 2)
    assert here.counted("headrace_batch_rows_total", outcome="completed") == 0
    await here.looks(2)
    await said(Code.CODE_OK, 3)
    assert await here.state("one") == "completed"
    assert here.counted("headrace_batch_rows_total", outcome="completed") == 3
    assert here.counted("headrace_batch_jobs_ended_total", state="completed") == 1
