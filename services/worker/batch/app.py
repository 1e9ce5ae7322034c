"""Batch work, wired."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from services.common.bus import Bus
from services.common.clock import Clock
from services.common.errors import Unavailable
from services.common.objects import ArtifactStore, InputSources
from services.common.topics import JOB_CONTROL, Topic, chunks
from services.worker.batch.consumer import ChunkConsumer
from services.worker.batch.deaths import Deaths
from services.worker.batch.group import Assignment, KafkaChunks
from services.worker.batch.jobs import Jobs
from services.worker.batch.metrics import BatchStats
from services.worker.batch.port import Chunks
from services.worker.batch.reading import ChunkReader
from services.worker.batch.work import ChunkWork, Shared, WorkOptions
from services.worker.loading import return_freed_memory
from services.worker.model_host import ModelHost

# Chunks that were cancelled while this worker was away are known before the first one is begun, unless the
# broker takes longer than this to say so.
_JOBS_S = 10.0
_READY_STEP_S = 0.1
# A file nobody has read for this long is closed, and what was decoded of it forgotten.
_IDLE_S = 10.0


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """`allow` are prefixes of inputs that may be read. `partitions` are those of the pool's topic."""

    pool: str
    allow: tuple[str, ...]
    s3_options: dict[str, str]
    directory: Path
    work: WorkOptions
    partitions: int = 8


#: Makes a member of a group that reads a topic.
OpenChunks = Callable[[Topic, str], Chunks]


def kafka_chunks(
    bootstrap: str, client_id: str, assignment: Assignment, session_timeout: float
) -> OpenChunks:
    """Chunks of the broker at `bootstrap`."""
    return lambda topic, group: KafkaChunks(
        bootstrap, client_id, topic, group, assignment=assignment, session_timeout=session_timeout
    )


class BatchWorker:
    """Batch work of one pool. It joins the pool's group once the worker is ready: partitions held by a worker
    that still loads its models would wait for it."""

    def __init__(
        self,
        options: BatchOptions,
        host: ModelHost,
        store: ArtifactStore,
        bus: Bus,
        open_chunks: OpenChunks,
        ready: Callable[[], bool],
        clock: Clock,
    ) -> None:
        self.stats = BatchStats()
        self._options = options
        self._host = host
        self._store = store
        self._bus = bus
        self._open_chunks = open_chunks
        self._ready = ready
        self._clock = clock
        self._chunks: Chunks | None = None
        self._consumer: ChunkConsumer | None = None
        self._leaving = False

    @property
    def partitions(self) -> int:
        """How many partitions of the pool's chunks are ours."""
        return self._chunks.partitions if self._chunks is not None else 0

    async def run(self) -> None:
        """Do chunks until cancelled."""
        options, clock = self._options, self._clock
        topic = chunks(options.pool, options.partitions)
        jobs = Jobs(clock)
        deaths = await asyncio.to_thread(Deaths, options.directory / "chunks")
        async with AsyncExitStack() as stack:
            table = await stack.enter_async_context(self._bus.table(JOB_CONTROL, jobs.apply))
            sources = InputSources(self._store, options.allow, options.s3_options)
            stack.push_async_callback(sources.close)
            reader = ChunkReader(sources)
            stack.push_async_callback(reader.close)
            while not self._ready():  # noqa: ASYNC110  conditions of many parts, which nobody announces
                await asyncio.sleep(_READY_STEP_S)
            with suppress(Unavailable):
                await table.ready(_JOBS_S)
            self._chunks = await stack.enter_async_context(self._open_chunks(topic, options.pool))
            shared = Shared(self._host, reader, self._store, self._chunks, jobs, deaths, clock, self.stats)
            work = ChunkWork(shared, options.work)
            stack.callback(work.close)
            self._consumer = ChunkConsumer(self._chunks, topic, options.pool, work.do, self.stats)
            stack.push_async_callback(self._consumer.stop, 0.0)
            if not self._leaving:
                self._consumer.start()
            await _release_idle(reader, self.stats)

    async def drain(self, seconds: float) -> None:
        """Take no more chunks, and finish those in work or leave them to others within `seconds`."""
        self._leaving = True
        if self._consumer is not None:
            await self._consumer.stop(seconds)


async def _release_idle(reader: ChunkReader, stats: BatchStats) -> None:
    """Give the memory of decoded inputs back where there is no work."""
    while True:
        before = stats.chunks.total()
        await asyncio.sleep(_IDLE_S)
        if not stats.in_work and stats.chunks.total() == before:
            await reader.release()
            if before:
                await asyncio.to_thread(return_freed_memory)
