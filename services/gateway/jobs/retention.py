"""What is forgotten when: control records a day after a job's end, idempotency keys after a day, jobs with
their results after the retention time."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from types import TracebackType
from typing import Self

import structlog

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.changes import JobChanges
from services.gateway.jobs.publishing import output_prefix
from services.gateway.jobs.repository import JobRepository
from services.gateway.jobs.service import inline_folder

log = structlog.get_logger(__name__)

_LOOK_EVERY_S = 300.0
_DAY = timedelta(days=1)
_JOBS_AT_ONCE = 50


class Retention:
    """Removes what is old, a little at a time."""

    def __init__(self, backend: Backend, clock: Clock, kept: timedelta) -> None:
        """`kept`: how long results can be read after a job's end."""
        self._backend = backend
        self._clock = clock
        self._kept = kept
        #: Jobs that workers need not know of since the last look.
        self._forgotten = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="jobs:retention")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> int:
        """Forget and remove what is due; how many jobs were removed."""
        now = self._clock.now()
        async with transaction(self._backend.engine) as session:
            changes = JobChanges(session, now)
            ended = await changes.repository.to_forget(now - min(_DAY, self._kept), _JOBS_AT_ONCE)
            for job in ended:
                changes.forget(job)
            await changes.repository.forget_idempotency(now - _DAY)
            await changes.finish()
        self._forgotten = len(ended)
        async with transaction(self._backend.engine) as session:
            old = await JobRepository(session).to_forget(now - self._kept, _JOBS_AT_ONCE, forgotten=True)
        for job in old:
            for folder in (output_prefix(job.job_id), inline_folder(job.job_id)):
                for one in await self._backend.store.list(folder):
                    await self._backend.store.delete(one.path)
        # The rows go last: with them nobody would know of the objects.
        async with transaction(self._backend.engine) as session:
            await JobRepository(session).delete([job.job_id for job in old])
        return len(old)

    async def _run(self) -> None:
        while True:
            try:
                while max(await self.look(), self._forgotten) == _JOBS_AT_ONCE:
                    pass
            except HeadraceError as error:
                log.warning("old_jobs_stay", reason=error.message)
            except Exception:
                log.exception("old_jobs_stay")
            await asyncio.sleep(_LOOK_EVERY_S)
