"""A job under any interleaving of publications, deliveries, results told late or twice, cancelling, expiry
and failures: what is counted is what can be read back. No database: the rules, and rows in memory."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pyarrow as pa
import pytest
from headrace.v1.batch_pb2 import BatchChunkResult
from headrace.v1.tensor_pb2 import Code
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.bus import Record
from services.gateway.jobs import results
from services.gateway.jobs.changes import JobChanges
from services.gateway.jobs.decisions import GRACE, MAX_ATTEMPTS, OF_THE_JOB, next_step
from services.gateway.jobs.tables import ChunkRow, JobRow

ROWS = 4
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
LIFE = timedelta(hours=1)
#: What a worker may come to: a code, and whether it stopped half way.
FATES = (
    (Code.CODE_OK, False),
    (Code.CODE_CANCELLED, True),
    (Code.CODE_DEADLINE_EXCEEDED, True),
    (Code.CODE_UNAVAILABLE, False),
    (Code.CODE_INTERNAL, True),
    (Code.CODE_INVALID_ARGUMENT, False),
)


class InMemory:
    """The part of the repository that changes of one job need."""

    def __init__(self, chunks: Sequence[ChunkRow]) -> None:
        self._chunks = chunks

    async def flush(self) -> None:
        return

    async def publish(self, records: Sequence[Record]) -> None:
        return

    async def drop(self, _job_id: str, *states: str) -> None:
        for chunk in self._chunks:
            if chunk.state in states:
                chunk.state = "dropped"

    async def mark_flying(self, _job_id: str, attempts: Mapping[int, int], state: str, now: datetime) -> int:
        count = 0
        for index, attempt in attempts.items():
            chunk = self._chunks[index]
            if chunk.state == state and chunk.attempt == attempt - 1:
                chunk.state, chunk.attempt, chunk.published_at = "flying", attempt, now
                count += 1
        return count


@dataclass
class World:
    """One job of `sizes` chunks; the broker keeps every publication, the network every result."""

    sizes: int
    now: datetime = BEGAN
    published: list[tuple[int, int]] = field(default_factory=list)
    said: list[BatchChunkResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.job = JobRow(
            job_id="job", state="in_progress", is_split=True, chunks=self.sizes, open_chunks=self.sizes,
            flying_chunks=0, rows=self.sizes * ROWS, completed=0, failed=0, revision=1, created_at=BEGAN,
            in_progress_at=BEGAN, expires_at=BEGAN + LIFE, callback_url="", ending=None,
        )  # fmt: skip
        self.chunks = [
            ChunkRow(
                job_id="job", index=index, state="open", first_row=index * ROWS, rows=ROWS, attempt=0,
                refusals=0, code=Code.CODE_OK, message="", field="", rows_done=0, rows_failed=0,
                results_object="", errors_object="",
            )
            for index in range(self.sizes)
        ]  # fmt: skip

    def changes(self) -> JobChanges:
        session: Any = None
        made = JobChanges(session, self.now)
        made.repository = InMemory(self.chunks)  # type: ignore[assignment]  # the part that is used
        return made

    async def publish(self, at: int) -> None:
        """An open chunk, or one that flies already: it was thought lost."""
        chunk = self.chunks[at % self.sizes]
        if self.job.ended_at is not None or self.job.cancelling_at is not None:
            return
        if chunk.state in ("open", "flying") and chunk.attempt < MAX_ATTEMPTS:
            self.published.append((chunk.index, chunk.attempt + 1))
            if at % 5:  # else the gateway died before it wrote that down
                again = chunk.state == "flying"
                await self.changes().published(self.job, {chunk.index: chunk.attempt + 1}, again=again)

    async def deliver(self, at: int) -> None:
        """Any publication to any worker, once more perhaps."""
        if self.published:
            index, attempt = self.published[at % len(self.published)]
            code, stops = FATES[at % len(FATES)]
            self.said.append(_result(index, attempt, code, stops=stops, bad=at % 3 == 0))

    async def tell(self, at: int) -> None:
        """Any result, again or late perhaps."""
        if self.said:
            result = self.said[at % len(self.said)]
            before = (self.job.completed, self.job.failed, self.job.state)
            counted = await self.changes().result(self.job, self.chunks[result.index], result)
            assert counted or before == (self.job.completed, self.job.failed, self.job.state)

    async def cancel(self, _at: int) -> None:
        await self.changes().stop(self.job, "cancelled")

    async def wait(self, at: int) -> None:
        self.now += (timedelta(seconds=1), GRACE, LIFE / 2)[at % 3]
        await self.tick()

    async def tick(self) -> None:
        step = next_step(self.job, self.now)
        if step.stop is not None:
            await self.changes().stop(self.job, step.stop)
        elif step.end is not None:
            await self.changes().end(self.job, step.end)

    async def finish(self) -> None:
        """From here on nothing goes wrong."""
        for _ in range(1000):
            if self.job.ended_at is not None:
                return
            for chunk in self.chunks:
                if chunk.state == "open" and self.job.cancelling_at is None:
                    await self.changes().published(self.job, {chunk.index: chunk.attempt + 1}, again=False)
                if chunk.state == "flying":
                    done = _result(chunk.index, chunk.attempt, Code.CODE_OK, stops=False, bad=False)
                    await self.changes().result(self.job, chunk, done)
            self.now += timedelta(seconds=1)
            await self.tick()
        raise AssertionError(f"the job does not end: {self.job.state}")

    def check_places(self) -> None:
        """What the job counts of its chunks is what there is."""
        if self.job.ended_at is None:
            states = [chunk.state for chunk in self.chunks]
            assert self.job.flying_chunks == states.count("flying")
            assert self.job.open_chunks == states.count("open")
        else:
            assert {chunk.state for chunk in self.chunks} <= {"done", "dropped"}


def _result(index: int, attempt: int, code: Code, *, stops: bool, bad: bool) -> BatchChunkResult:
    """What a worker says: the rows up to where it stopped, of which the first may have failed."""
    nothing = code in (*OF_THE_JOB, Code.CODE_UNAVAILABLE)
    rows = [] if nothing else list(range(index * ROWS, index * ROWS + (ROWS // 2 if stops else ROWS)))
    failed, done = (rows[:1], rows[1:]) if bad else ([], rows)
    sink = io.BytesIO()
    batch = pa.record_batch({"row": pa.array(done, pa.uint64())})
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    errors = b"".join(orjson.dumps({"row": row, "error": {}}) + b"\n" for row in failed)
    return BatchChunkResult(
        job_id="job", index=index, attempt=attempt, code=code, rows_done=len(done), rows_failed=len(failed),
        results_inline=sink.getvalue() if done else b"", errors_inline=errors,
    )  # fmt: skip


async def _read_back(world: World) -> tuple[list[int], list[int]]:
    backend: Any = type("NoStore", (), {"store": None})
    done = [row async for batch in results.result_batches(backend, "job") for row in batch[0].to_pylist()]
    lines = [line async for piece in results.error_lines(backend, "job") for line in piece.splitlines()]
    return done, [orjson.loads(line)["row"] for line in lines]


STEPS = st.tuples(
    st.sampled_from(["publish", "publish", "deliver", "deliver", "tell", "tell", "tell", "cancel", "wait"]),
    st.integers(0, 1000),
)


@given(sizes=st.integers(1, 4), steps=st.lists(STEPS, max_size=60))
@settings(max_examples=200, deadline=None)
def test_what_is_counted_is_what_can_be_read_back(sizes: int, steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        world = World(sizes)
        for name, at in steps:
            await getattr(world, name)(at)
            world.check_places()
        await world.finish()
        world.check_places()
        counted = (world.job.completed, world.job.failed, world.job.state, world.job.revision)
        for result in world.said:  # the end is the end
            assert not await world.changes().result(world.job, world.chunks[result.index], result)
        assert counted == (world.job.completed, world.job.failed, world.job.state, world.job.revision)

        async def done_chunks(_backend: Any, _job_id: str) -> AsyncIterator[ChunkRow]:
            for chunk in world.chunks:
                if chunk.state == "done":
                    yield chunk

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(results, "done_chunks", done_chunks)
            done, failed = await _read_back(world)
        assert len(done) == len(set(done)) == world.job.completed
        assert len(failed) == len(set(failed)) == world.job.failed
        assert not set(done) & set(failed)
        if world.job.state == "completed":
            assert sorted(done + failed) == list(range(sizes * ROWS))

    asyncio.run(play())
