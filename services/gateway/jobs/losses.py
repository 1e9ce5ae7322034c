"""Finds chunks that the broker lost, or that nobody finishes, and publishes them once more."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Self

import structlog
from headrace.v1.batch_pb2 import BatchChunkResult
from headrace.v1.tensor_pb2 import Code

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError
from services.common.topics import JOB_RESULTS
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.changes import JobChanges
from services.gateway.jobs.controller import Controller
from services.gateway.jobs.decisions import MAX_ATTEMPTS, Flying, lost_chunks
from services.gateway.jobs.metrics import JobMetrics
from services.gateway.jobs.publishing import ChunkPublisher
from services.gateway.jobs.repository import JobRepository
from services.gateway.jobs.standing import PoolStanding
from services.gateway.jobs.tables import JobRow

log = structlog.get_logger(__name__)

_LOOK_EVERY_S = 1.0
_GROUP = "gateway"
_AT_ONCE = 64


class Losses:
    """Looks after the chunks of the jobs that `controller` leases."""

    def __init__(
        self,
        backend: Backend,
        publisher: ChunkPublisher,
        controller: Controller,
        clock: Clock,
        metrics: JobMetrics,
        changed: Callable[[str], None],
    ) -> None:
        self._backend = backend
        self._publisher = publisher
        self._controller = controller
        self._clock = clock
        self._metrics = metrics
        self._changed = changed
        self._standings: defaultdict[str, PoolStanding] = defaultdict(PoolStanding)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="jobs:losses")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> int:
        """Look once at every pool with chunks of ours; how many were published once more."""
        by_pool: dict[str, dict[str, JobRow]] = defaultdict(dict)
        for job in self._controller.jobs:
            if job.flying_chunks:
                by_pool[job.pool][job.job_id] = job
        for pool in self._standings.keys() - by_pool.keys():
            del self._standings[pool]
        return sum([await self._look_at(pool, jobs) for pool, jobs in by_pool.items()])

    async def _look_at(self, pool: str, jobs: dict[str, JobRow]) -> int:
        gone_before = await self._gone_before(pool, sum(job.flying_chunks for job in jobs.values()))
        # Read after the broker was asked: what had a result by then is not among them.
        async with transaction(self._backend.engine) as session:
            found = await JobRepository(session).flying(pool)
        flying = [Flying(*one) for one in found if one[0] in jobs]
        lost = lost_chunks(flying, gone_before, self._clock.now())
        for chunk in lost.given_up:
            await self._give_up(chunk)
        if lost.again:
            self._publisher.doubt(pool)
            self._standings[pool].published_again()
        again: dict[str, list[Flying]] = defaultdict(list)
        for chunk in lost.again:
            again[chunk.job_id].append(chunk)
        count = 0
        for job_id, chunks in again.items():
            for start in range(0, len(chunks), _AT_ONCE):
                count += await self._again(jobs[job_id], chunks[start : start + _AT_ONCE])
        if count:
            self._metrics.republished(count)
            log.warning("chunks_published_again", pool=pool, count=count)
        return count

    async def _gone_before(self, pool: str, flying: int) -> datetime | None:
        """What was published before this and has no result is gone; None: nothing is known to be."""
        standing, asked_at = self._standings[pool], self._clock.now()
        try:
            chunks, results = await self._publisher.standings(pool, JOB_RESULTS, _GROUP)
        except HeadraceError as error:
            log.warning("lag_not_known", pool=pool, reason=error.message)
            standing.unknown()
            return None
        return standing.gone_before(asked_at, chunks, results, flying)

    async def _again(self, job: JobRow, lost: Sequence[Flying]) -> int:
        attempts = {chunk.index: chunk.attempt for chunk in lost}
        async with transaction(self._backend.engine) as session:
            found = await JobRepository(session).chunks_at([(job.job_id, index) for index in attempts])
        chunks = [
            chunk
            for chunk in found.values()
            if chunk.state == "flying" and chunk.attempt == attempts[chunk.index]
        ]
        if not chunks:
            return 0
        published = await self._publisher.publish(job, chunks)
        async with transaction(self._backend.engine) as session:
            changes = JobChanges(session, self._clock.now())
            locked = await changes.repository.job(job.job_id, lock=True)
            if locked is None:
                return 0
            return await changes.published(locked, published, again=True)

    async def _give_up(self, lost: Flying) -> None:
        message = f"The chunk was tried {MAX_ATTEMPTS} times, and nobody finished it."
        told = BatchChunkResult(
            job_id=lost.job_id,
            index=lost.index,
            attempt=lost.attempt,
            code=Code.CODE_INTERNAL,
            message=message,
        )
        async with transaction(self._backend.engine) as session:
            changes = JobChanges(session, self._clock.now())
            job = await changes.repository.job(lost.job_id, lock=True)
            chunk = (await changes.repository.chunks_at([(lost.job_id, lost.index)])).get(
                (lost.job_id, lost.index)
            )
            if job is None or chunk is None or chunk.attempt != lost.attempt:
                return
            await changes.result(job, chunk, told)
            await changes.finish()
        self._metrics.committed(changes)
        log.error("chunk_given_up", job=lost.job_id, chunk=lost.index, attempts=lost.attempt)
        self._changed(lost.job_id)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self.look()
            except HeadraceError as error:
                log.warning("losses_not_known", reason=error.message)
            except Exception:
                log.exception("losses_not_known")
