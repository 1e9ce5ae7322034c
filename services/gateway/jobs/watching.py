"""Following jobs: one query a moment for all that are followed, however many follow them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

import structlog

from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError, ResourceExhausted
from services.gateway.jobs.backend import Availability
from services.gateway.jobs.repository import JobRepository
from services.gateway.jobs.views import Job, job_of

log = structlog.get_logger(__name__)

_MAX_WATCHERS = 2000
_POLL_S = 1.0
#: Changes closer together than this are told as one.
_PAUSE_S = 0.4
_RETRY_MS = 5000


class _Watcher:
    """The newest state that its reader has not seen; older ones are forgotten, so nothing piles up."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.told = False
        self.news = asyncio.Event()
        self.news.set()


class Watching:
    """Every watcher of this process. A job that is gone ends its watchers."""

    def __init__(self, availability: Availability, clock: Clock) -> None:
        self._availability = availability
        self._clock = clock
        self._watchers: dict[str, set[_Watcher]] = {}
        self._count = 0
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="jobs:watching")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def close(self) -> None:
        """End every watcher; their readers ask another gateway."""
        self._closing = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.news.set()

    def changed(self, job_id: str) -> None:
        """Something happened to a job; do not wait for the next look."""
        if job_id in self._watchers:
            self._wake.set()

    async def follow(self, job: Job) -> AsyncGenerator[Job, None]:
        """`job` as it is now, then as it changes, the last time when it has ended. Raises ResourceExhausted
        where too many follow."""
        if self._count >= _MAX_WATCHERS:
            raise ResourceExhausted("Too many follow jobs here.", retry_after_ms=_RETRY_MS)
        watcher = _Watcher(job)
        watchers = self._watchers.setdefault(job.job_id, set())
        watchers.add(watcher)
        self._count += 1
        self._wake.set()
        try:
            while not (watcher.told and self._closing):
                await watcher.news.wait()
                if watcher.told and self._closing:
                    return
                watcher.news.clear()
                watcher.told = True
                yield watcher.job
                if watcher.job.ended:
                    return
        finally:
            self._count -= 1
            watchers.discard(watcher)
            if not watchers:
                self._watchers.pop(job.job_id, None)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look()
            except HeadraceError as error:
                log.warning("jobs_not_followed", reason=error.message)
            except Exception:
                log.exception("jobs_not_followed")
            await asyncio.sleep(_PAUSE_S)
            try:
                async with asyncio.timeout(_POLL_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _look(self) -> None:
        if not self._watchers:
            return
        async with transaction(self._availability.ready().engine) as session:
            rows = await JobRepository(session).jobs(list(self._watchers))
        now = self._clock.now()
        for row in rows:
            job = job_of(row, now)
            for watcher in self._watchers.get(job.job_id, ()):
                if job.revision > watcher.job.revision:
                    watcher.job = job
                    watcher.news.set()
