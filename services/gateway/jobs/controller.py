"""Moves jobs on: leases them, cuts their inputs, publishes chunks while there is room, and ends what is over.

Everything it knows is in the database. Whatever it does is decided again under the job's lock, so that two
controllers, or one that was taken for dead, do no harm.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

import structlog
from headrace.v1.batch_pb2 import InputFormat
from headrace.v1.tensor_pb2 import Code

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError, InvalidArgument
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.changes import JobChanges
from services.gateway.jobs.decisions import OF_THE_JOB, Claim, Ending, allotted, next_step, window_of
from services.gateway.jobs.metrics import JobMetrics
from services.gateway.jobs.pauses import Pauses
from services.gateway.jobs.publishing import ChunkPublisher
from services.gateway.jobs.repository import JobRepository, Place
from services.gateway.jobs.sizing import chunk_limits
from services.gateway.jobs.splitting import Cut, Input, cuts
from services.gateway.jobs.tables import JobRow
from services.gateway.jobs.views import JobError
from services.gateway.pools import Pools

log = structlog.get_logger(__name__)

_LEASE = timedelta(seconds=15)
_JOBS_AT_ONCE = 256
_CUTTING_AT_ONCE = 8
_CUTTING_PER_KEY = 2
#: An input that cannot be reached now is asked for again after this time, doubled each time up to the most.
_CUT_AGAIN_S, _MOST_CUT_AGAIN_S = 1.0, 30.0
_TICK_S = 1.0
#: Without a job of its own it is woken for the next; this finds what another gateway has left.
_IDLE_S = 2.0
#: The same where the jobs are more than one look takes.
_TURN_S = 0.25
#: Wake-ups closer together than this are one.
_PAUSE_S = 0.02
_MEASURE_EVERY_S = 5.0
_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Backoff:
    """An input that was away `tries` times; not asked for again before `until`."""

    tries: int
    until: float


class Controller:
    """One gateway's share of the jobs under way."""

    def __init__(
        self,
        owner: str,
        backend: Backend,
        publisher: ChunkPublisher,
        pools: Pools,
        clock: Clock,
        metrics: JobMetrics,
        changed: Callable[[str], None],
    ) -> None:
        """`owner` names this process; `changed` is told the ids of jobs that changed."""
        self._jobs: dict[str, JobRow] = {}
        #: Of this round: where the next look goes on, and what was seen.
        self._after: Place | None = None
        self._seen: set[str] = set()
        self._owner = owner
        self._backend = backend
        self._publisher = publisher
        self._pools = pools
        self._clock = clock
        self._metrics = metrics
        self._changed = changed
        self._cutting: dict[str, asyncio.Task[None]] = {}
        self._backoff: dict[str, _Backoff] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._measured_at = -_MEASURE_EVERY_S
        self._pauses = Pauses(clock, _IDLE_S)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="jobs:controller")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._wake.set()
        tasks = {*self._cutting.values(), *([self._task] if self._task is not None else [])}
        for task in self._cutting.values():
            task.cancel()
        if tasks:
            _done, late = await asyncio.wait(tasks, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with transaction(self._backend.engine) as session:
                await JobRepository(session).release(self._owner)
        except HeadraceError as lost:
            log.warning("jobs_not_released", reason=lost.message)

    @property
    def jobs(self) -> Collection[JobRow]:
        """The jobs leased, as they were when each was looked at last; without the rows that travel with
        them."""
        return self._jobs.values()

    @property
    def cutting(self) -> int:
        """How many inputs are being cut."""
        return len(self._cutting)

    def wake(self) -> None:
        """Something changed; do not wait for the next look."""
        self._pauses.worked()
        self._wake.set()

    async def tick(self) -> None:
        """Look once at the jobs that this gateway leases, where they are many at the next of them, and do
        what is next."""
        now = self._clock.now()
        wanting: list[JobRow] = []
        for job in await self._next_jobs():
            step = next_step(job, now)
            if step.stop is not None or step.end is not None:
                await self._finish(job.job_id)
            if step.cut:
                self._cut(job)
            if step.publish:
                wanting.append(job)
        if wanting:
            await self._publish(wanting)
        if self._clock.monotonic() - self._measured_at >= _MEASURE_EVERY_S:
            self._measured_at = self._clock.monotonic()
            await self._measure()

    async def _next_jobs(self) -> Sequence[JobRow]:
        """All jobs where they are few. Otherwise everyone has its turn: many that only wait, for a pool
        without workers say, delay the others and never keep them out."""
        async with transaction(self._backend.engine) as session:
            repository = JobRepository(session)
            await repository.claim(self._owner, self._clock.now(), _LEASE, _JOBS_AT_ONCE)
            found = await repository.leased(self._owner, self._after, _JOBS_AT_ONCE)
        self._jobs |= {job.job_id: job for job in found}
        self._seen |= {job.job_id for job in found}
        if len(found) == _JOBS_AT_ONCE:
            last = found[-1]
            self._after = (last.priority, last.created_at, last.job_id)
        else:
            self._jobs = {job_id: job for job_id, job in self._jobs.items() if job_id in self._seen}
            self._backoff = {job_id: one for job_id, one in self._backoff.items() if job_id in self._seen}
            self._after, self._seen = None, set()
        return found

    async def fail(self, job_id: str, error: JobError) -> None:
        """The job cannot go on."""
        await self._stop(job_id, "failed", error)

    async def _finish(self, job_id: str) -> None:
        """Take the step that ends a job, where it is still the next one."""
        async with transaction(self._backend.engine) as session:
            changes = JobChanges(session, self._clock.now())
            job = await changes.repository.job(job_id, lock=True)
            if job is None:
                return
            step = next_step(job, self._clock.now())
            if step.stop is not None:
                await changes.stop(job, step.stop)
            elif step.end is not None:
                await changes.end(job, step.end)
            await changes.finish()
        self._told(job, changes)

    async def _stop(self, job_id: str, ending: Ending, error: JobError | None = None) -> None:
        async with transaction(self._backend.engine) as session:
            changes = JobChanges(session, self._clock.now())
            job = await changes.repository.job(job_id, lock=True)
            if job is None:
                return
            await changes.stop(job, ending, error)
            await changes.finish()
        self._told(job, changes)

    def _told(self, job: JobRow, changes: JobChanges) -> None:
        self._metrics.committed(changes)
        self._changed(job.job_id)

    # cutting

    def _cut(self, job: JobRow) -> None:
        if job.job_id in self._cutting or len(self._cutting) >= _CUTTING_AT_ONCE:
            return
        waiting = self._backoff.get(job.job_id)
        if waiting is not None and self._clock.monotonic() < waiting.until:
            return
        # One key's terabytes leave room for the others' kilobytes.
        cutting = (self._jobs.get(job_id) for job_id in self._cutting)
        mine = sum(1 for one in cutting if one is not None and one.key_id == job.key_id)
        if mine >= _CUTTING_PER_KEY:
            return
        task = asyncio.create_task(self._cut_to_end(job), name=f"jobs:cut:{job.job_id}")
        self._cutting[job.job_id] = task
        task.add_done_callback(lambda _task: self._is_cut(job.job_id))

    def _is_cut(self, job_id: str) -> None:
        self._cutting.pop(job_id, None)
        if not self._stopping:
            self.wake()  # others wait for the place

    async def _cut_to_end(self, looked_at: JobRow) -> None:
        try:
            async with transaction(self._backend.engine) as session:
                job = await JobRepository(session).job(looked_at.job_id)
        except HeadraceError as error:
            self._cut_later(looked_at.job_id, error)
            return
        if job is None or job.is_split:
            return
        speed = self._pools.speed(job.pool, job.model, job.version)
        limits = chunk_limits(speed.best_rows, speed.rows_per_s)
        given = Input(job.input_uri, _format(job), job.etag, job.inline_input)
        chunks = job.chunks
        try:
            async with aclosing(cuts(self._backend.sources, given, limits, job.cursor)) as found:
                async for cut in found:
                    if not await self._add(job.job_id, cut, chunks):
                        return
                    chunks += len(cut.chunks)
        except HeadraceError as error:
            if error.code not in OF_THE_JOB:  # the store or the database is away: the next look goes on
                self._cut_later(job.job_id, error)
                return
            await self._failed(job.job_id, JobError(error.code, error.message, error.field or ""))
        except Exception:
            log.exception("job_cut_crashed", job=job.job_id)
            error_of_ours = JobError(
                Code.CODE_INTERNAL, "The input could not be cut into chunks.", "input_uri"
            )
            await self._failed(job.job_id, error_of_ours)

    def _cut_later(self, job_id: str, error: HeadraceError) -> None:
        """Something is away: ask again at growing distances, so that the look at every change is not one at
        what is away too."""
        tries = self._backoff[job_id].tries + 1 if job_id in self._backoff else 1
        wait_s = min(_CUT_AGAIN_S * 2.0 ** min(tries - 1, 10), _MOST_CUT_AGAIN_S)
        self._backoff[job_id] = _Backoff(tries, self._clock.monotonic() + wait_s)
        log.warning("job_not_cut", job=job_id, reason=error.message, again_in_s=wait_s)

    async def _failed(self, job_id: str, error: JobError) -> None:
        try:
            await self.fail(job_id, error)
        except HeadraceError as lost:  # found wrong once more, by whoever leases it then
            log.warning("job_not_failed", job=job_id, reason=lost.message)

    async def _add(self, job_id: str, cut: Cut, chunks: int) -> bool:
        """Store a cut behind `chunks`; False where somebody else cuts the job now, or nobody should."""
        async with transaction(self._backend.engine) as session:
            changes = JobChanges(session, self._clock.now())
            job = await changes.repository.job(job_id, lock=True)
            if job is None or job.lease_owner != self._owner or job.chunks != chunks or job.is_split:
                return False
            if job.cancelling_at is not None or job.ended_at is not None:
                return False
            await changes.add_cut(job, cut)
            await changes.finish()
        self._backoff.pop(job_id, None)
        self._told(job, changes)
        self.wake()
        return True

    # publishing

    async def _publish(self, wanting: Sequence[JobRow]) -> None:
        async with transaction(self._backend.engine) as session:
            flying = {pool: one.flying for pool, one in (await JobRepository(session).backlog()).items()}
        by_pool: dict[str, list[JobRow]] = defaultdict(list)
        for job in wanting:
            by_pool[job.pool].append(job)
        for pool, jobs in by_pool.items():
            window = window_of(self._publisher.partitions, self._pools.workers(pool))
            others = flying.get(pool, 0) - sum(job.flying_chunks for job in jobs)
            claims = [Claim(job.job_id, job.priority, job.flying_chunks, job.open_chunks) for job in jobs]
            given = allotted(claims, window - max(0, others))
            try:
                for job in jobs:
                    if given.get(job.job_id):
                        await self._publish_or_fail(job, given[job.job_id])
            except HeadraceError as error:  # the broker is away, or this pool's topic is not as it should be
                log.warning("chunks_not_published", pool=pool, reason=error.message)

    async def _publish_or_fail(self, job: JobRow, count: int) -> None:
        try:
            await self._publish_some(job, count)
        except InvalidArgument as error:  # no broker would ever take it; the other jobs must not wait for it
            await self.fail(job.job_id, JobError(error.code, error.message, error.field or ""))

    async def _publish_some(self, job: JobRow, count: int) -> None:
        async with transaction(self._backend.engine) as session:
            chunks = await JobRepository(session).open_chunks(job.job_id, count)
        if not chunks:
            return
        attempts = await self._publisher.publish(job, chunks)
        # A crash from here on publishes them once more: results count once.
        async with transaction(self._backend.engine) as session:
            changes = JobChanges(session, self._clock.now())
            locked = await changes.repository.job(job.job_id, lock=True)
            if locked is None:
                return
            await changes.published(locked, attempts, again=False)
            await changes.finish()

    async def _measure(self) -> None:
        async with transaction(self._backend.engine) as session:
            repository = JobRepository(session)
            self._metrics.states(await repository.states())
            self._metrics.backlog(await repository.backlog())

    async def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                await self.tick()
            except HeadraceError as error:
                log.warning("jobs_wait", reason=error.message)
            except Exception:
                log.exception("jobs_wait")
            await asyncio.sleep(_PAUSE_S)
            try:
                async with asyncio.timeout(self._pause_s()):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _pause_s(self) -> float:
        if self._after is not None:
            return _TURN_S
        if self._jobs:
            self._pauses.worked()
            return _TICK_S
        return self._pauses.next_s()


def _format(job: JobRow) -> InputFormat:
    return job.input_format  # type: ignore[return-value]  # stored as its number
