"""What workers are told of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from headrace.v1.batch_pb2 import BatchChunk, InputRange

from services.common.bus import MemoryBus
from services.common.clock import ManualClock
from services.common.topics import Topic, chunks
from services.gateway.jobs.decisions import CLOCKS_APART
from services.gateway.jobs.publishing import ChunkPublisher
from services.gateway.jobs.tables import ChunkRow, JobRow


async def no_topics(_topics: Sequence[Topic]) -> None:
    return


async def test_a_worker_whose_clock_is_ahead_does_not_end_a_job_that_has_time() -> None:
    """A worker says of a chunk that came too late that the job has expired, and that ends the job."""
    gateway, worker, bus = ManualClock(), ManualClock(), MemoryBus()
    worker.set(CLOCKS_APART.total_seconds() - 60)
    job = JobRow(
        job_id="job", model="m", version="1", artifact_digest="", pool="p", priority=1, key_id="k",
        run_rows=0, exclude_from_drift=False, exclude_from_experiments=False,
        expires_at=gateway.now() + timedelta(seconds=60),
    )  # fmt: skip
    chunk = ChunkRow(index=0, attempt=0, first_row=0, rows=1, input=InputRange().SerializeToString())
    await ChunkPublisher(bus, no_topics, 1, gateway).publish(job, [chunk])
    (record,) = bus.records(chunks("p", 1).name)
    assert BatchChunk.FromString(record.value or b"").expires_at_us > worker.unix_us()
