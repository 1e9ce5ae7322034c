"""Chunks on their way to the workers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog
from headrace.v1.batch_pb2 import BatchChunk, InputRange

from services.common.bus import Bus, Record, Standing
from services.common.clock import Clock
from services.common.errors import FailedPrecondition, Unavailable
from services.common.topics import Topic, chunks, dead_letters
from services.gateway.jobs.decisions import CLOCKS_APART
from services.gateway.jobs.tables import ChunkRow, JobRow

log = structlog.get_logger(__name__)

#: Makes topics where they are missing, with their partitions: a broker that makes them on first use gives
#: them other ones.
EnsureTopics = Callable[[Sequence[Topic]], Awaitable[object]]

_ENSURE_EVERY_S = 60.0


class ChunkPublisher:
    """Publishes chunks of every pool."""

    def __init__(self, bus: Bus, ensure: EnsureTopics, partitions: int, clock: Clock) -> None:
        self.partitions = partitions
        self._bus = bus
        self._ensure = ensure
        self._clock = clock
        self._ensured: dict[str, float] = {}

    async def publish(self, job: JobRow, given: Sequence[ChunkRow]) -> dict[int, int]:
        """Return once the broker has them; the attempt of each, by index. Raises Unavailable, and then some
        may have arrived."""
        topic = await self._topic(job.pool)
        try:
            await self._bus.publish([_record(topic, job, chunk) for chunk in given])
        except Exception:
            self.doubt(job.pool)
            raise
        return {chunk.index: chunk.attempt + 1 for chunk in given}

    async def standings(self, pool: str, topic: Topic, group: str) -> tuple[Standing, Standing]:
        """How far the pool's workers have come with chunks, and `group` with `topic`. Raises Unavailable."""
        chunked = await self._topic(pool)
        try:
            of_chunks, other = await self._bus.standings([(chunked, pool), (topic, group)])
        except Exception:
            self.doubt(pool)
            raise
        if of_chunks is None or other is None:
            self.doubt(pool)  # a broker that lost its memory does not know the topic either
            raise Unavailable(f"the event broker knows no topic {(topic if of_chunks else chunked).name}")
        return of_chunks, other

    async def _topic(self, pool: str) -> Topic:
        topic = chunks(pool, self.partitions)
        now = self._clock.monotonic()
        if now - self._ensured.get(pool, -_ENSURE_EVERY_S) >= _ENSURE_EVERY_S:
            try:
                await self._ensure([topic, dead_letters(topic, pool)])
            except FailedPrecondition as error:
                # Some brokers make a topic when it is named, before anybody can say with how many partitions.
                # Fewer of them divide the work less finely; chunks need no order, so it goes on.
                log.warning("topic_has_few_partitions", reason=error.message)
            self._ensured[pool] = now
        return topic

    def doubt(self, pool: str) -> None:
        """The broker may have lost the topic: look again before publishing."""
        self._ensured.pop(pool, None)


def output_prefix(job_id: str) -> str:
    """The folder in the artifact store of what a job comes to."""
    return f"jobs/{job_id}"


def _record(topic: Topic, job: JobRow, chunk: ChunkRow) -> Record:
    told = BatchChunk(
        job_id=job.job_id,
        index=chunk.index,
        attempt=chunk.attempt + 1,
        model=job.model,
        version=job.version,
        artifact_digest=job.artifact_digest,
        first_row=chunk.first_row,
        rows=chunk.rows,
        input=InputRange.FromString(chunk.input),
        output_prefix=output_prefix(job.job_id),
        priority=job.priority,  # type: ignore[arg-type]  # stored as its number
        # By the worker's clock, and one that is ahead must not end the job. Workers are told when it expires.
        expires_at_us=round((job.expires_at + CLOCKS_APART).timestamp() * 1e6),
        exclude_from_drift=job.exclude_from_drift,
        exclude_from_experiments=job.exclude_from_experiments,
        key_id=job.key_id,
        run_rows=job.run_rows,
    )
    return Record(topic.name, f"{job.job_id}/{chunk.index}".encode(), told.SerializeToString())
