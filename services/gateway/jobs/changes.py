"""Changes of a job, each within a transaction that holds the job's row: what is counted, what is told to
whom."""

from __future__ import annotations

from datetime import datetime
from urllib.parse import urlsplit

import orjson
from headrace.v1.batch_pb2 import BatchChunkResult, BatchControl
from headrace.v1.tensor_pb2 import Code
from sqlalchemy.ext.asyncio import AsyncSession

from services.common.bus import Record
from services.common.ids import id_text, new_id
from services.common.topics import JOB_CONTROL
from services.gateway.jobs.decisions import Ending, is_stale, judged, next_step
from services.gateway.jobs.progress import updated_rate
from services.gateway.jobs.repository import JobRepository
from services.gateway.jobs.splitting import Cut
from services.gateway.jobs.tables import ChunkRow, DeliveryRow, JobRow
from services.gateway.jobs.views import JobError, job_json, job_of

_STOPPED: dict[str, BatchControl.State] = {
    "cancelled": BatchControl.STATE_CANCELLED,
    "failed": BatchControl.STATE_CANCELLED,
    "expired": BatchControl.STATE_EXPIRED,
}
_MAX_MESSAGE = 2000


class JobChanges:
    """What one transaction changes. `finish` ends it: records go to the outbox, which is the last thing
    done."""

    def __init__(self, session: AsyncSession, now: datetime) -> None:
        self.repository = JobRepository(session)
        self._session = session
        self._now = now
        self._records: list[Record] = []
        #: What came of it, for who counts once it is committed: jobs that ended, and rows that are over.
        self.ended: list[JobRow] = []
        self.rows_done = self.rows_failed = 0

    async def add_cut(self, job: JobRow, cut: Cut) -> None:
        """Chunks that were found behind those known."""
        rows = [
            {
                "job_id": job.job_id,
                "index": job.chunks + number,
                "state": "open",
                "first_row": chunk.first_row,
                "rows": chunk.rows,
                "input": chunk.input.SerializeToString(),
                "attempt": 0,
                "refusals": 0,
                "code": Code.CODE_OK,
                "message": "",
                "field": "",
                "rows_done": 0,
                "rows_failed": 0,
                "results_object": "",
                "errors_object": "",
            }
            for number, chunk in enumerate(cut.chunks)
        ]
        await self.repository.add_chunks(rows)
        job.chunks += len(rows)
        job.open_chunks += len(rows)
        job.rows = cut.rows
        job.cursor = cut.cursor
        job.is_split = cut.done
        if job.state == "validating" and rows:
            job.state = "in_progress"
            job.in_progress_at = self._now
        job.revision += 1
        await self._end_if_over(job)

    async def published(self, job: JobRow, attempts: dict[int, int], *, again: bool) -> int:
        """Chunks were given to the broker with these attempts."""
        state = "flying" if again else "open"
        count = await self.repository.mark_flying(job.job_id, attempts, state, self._now)
        if not again:
            job.open_chunks -= count
            job.flying_chunks += count
        return count

    async def result(self, job: JobRow, chunk: ChunkRow, result: BatchChunkResult) -> bool:
        """A worker's word on a chunk; False where it is not the first, nobody waits for it any more, or
        another attempt is under way that it says nothing of."""
        if job.ended_at is not None or chunk.state not in ("open", "flying"):
            return False
        cancelling = job.cancelling_at is not None
        # An open chunk may be published already, and not marked: the one before was answered.
        awaited = chunk.attempt if chunk.state == "flying" else chunk.attempt + 1
        if is_stale(result, awaited, cancelling=cancelling):
            return False
        verdict = judged(result, chunk.rows, chunk.attempt, cancelling=cancelling, refusals=chunk.refusals)
        if chunk.state == "open":  # published, and not marked: whoever published it died in between
            job.open_chunks -= 1
        else:
            job.flying_chunks -= 1
        if verdict.again:
            chunk.state = "open"
            chunk.refusals += result.code == Code.CODE_UNAVAILABLE
            job.open_chunks += 1
            return True
        chunk.state = "done"
        chunk.done_at = self._now
        chunk.code = result.code
        chunk.message = _text(result.message)
        chunk.field = _text(result.field)
        chunk.rows_done, chunk.rows_failed = verdict.done, verdict.failed
        chunk.results_object, chunk.errors_object = result.results_object, result.errors_object
        chunk.results_inline = result.results_inline or None
        chunk.errors_inline = result.errors_inline or None
        counted = verdict.done + verdict.failed
        job.rate = updated_rate(job, counted, self._now)
        job.rate_at = self._now
        job.completed += verdict.done
        job.failed += verdict.failed
        self.rows_done += verdict.done
        self.rows_failed += verdict.failed
        job.revision += 1
        if verdict.stop == "failed":
            await self.stop(job, "failed", JobError(result.code, chunk.message, chunk.field))
        elif verdict.stop is not None:
            await self.stop(job, verdict.stop)
        else:
            await self._end_if_over(job)
        return True

    async def stop(self, job: JobRow, ending: Ending, error: JobError | None = None) -> None:
        """Begin to end `job`: nothing more is published, workers are told, and what they have finished is
        waited for. The first reason counts."""
        if job.ended_at is not None or job.cancelling_at is not None:
            return
        job.state, job.ending, job.cancelling_at = "cancelling", ending, self._now
        if error is not None:
            job.error = {"code": error.code, "message": _text(error.message), "field": error.field}
        await self.repository.flush()
        await self.repository.drop(job.job_id, "open")
        job.open_chunks = 0
        job.revision += 1
        told = BatchControl(job_id=job.job_id, state=_STOPPED[ending])
        self._records.append(Record(JOB_CONTROL.name, job.job_id.encode(), told.SerializeToString()))
        await self._end_if_over(job)

    async def end(self, job: JobRow, ending: Ending) -> None:
        """It is over: nothing changes any more."""
        if job.ended_at is not None:
            return
        await self.repository.flush()
        await self.repository.drop(job.job_id, "open", "flying")
        job.state, job.ended_at = ending, self._now
        job.open_chunks = job.flying_chunks = 0
        job.lease_owner = job.lease_until = None
        job.inline_input = None
        job.revision += 1
        self.ended.append(job)
        if job.callback_url:
            self._session.add(_delivery(job, self._now))

    def forget(self, job: JobRow) -> None:
        """Workers need not know of it any more."""
        job.is_forgotten = True
        self._records.append(Record(JOB_CONTROL.name, job.job_id.encode(), None))

    async def finish(self) -> bool:
        """Send what was changed; True where the relay of the outbox has something to do."""
        await self.repository.flush()
        await self.repository.publish(self._records)
        return bool(self._records)

    async def _end_if_over(self, job: JobRow) -> None:
        step = next_step(job, self._now)
        if step.end is not None:
            await self.end(job, step.end)


def _delivery(job: JobRow, now: datetime) -> DeliveryRow:
    return DeliveryRow(
        delivery_id=id_text(new_id()),
        job_id=job.job_id,
        url=job.callback_url,
        host=urlsplit(job.callback_url).hostname or "",
        body=orjson.dumps(job_json(job_of(job, now))),
        attempts=0,
        due_at=now,
        created_at=now,
        last_error="",
    )


def _text(text: str) -> str:
    """What PostgreSQL takes: no zero character, and not without end."""
    return text.replace("\0", "")[:_MAX_MESSAGE]
