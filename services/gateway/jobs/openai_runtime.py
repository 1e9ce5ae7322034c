"""OpenAI's files and batches, wired and kept going beside real-time serving."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import structlog

from services.common.clock import Clock
from services.common.errors import HeadraceError
from services.gateway.catalogue import Catalogue
from services.gateway.jobs.openai_batches import FORGOTTEN_AT_ONCE, OpenAIBatches
from services.gateway.jobs.openai_files import Files
from services.gateway.jobs.openai_steps import OpenAISteps
from services.gateway.jobs.service import JobService
from services.gateway.keys import KeyRing

log = structlog.get_logger(__name__)

#: Batches that take a step at the same time.
_AT_ONCE = 2
_LEFT_S = 24 * 3600.0
_FORGET_S = 300.0


@dataclass(frozen=True, slots=True)
class OpenAIParts:
    """What the routes are made of."""

    files: Files
    batches: OpenAIBatches
    jobs: JobService


@asynccontextmanager
async def openai_running(
    jobs: JobService,
    catalogue: Catalogue,
    keys: KeyRing,
    clock: Clock,
    folder: Path,
    *,
    max_file_bytes: int,
    kept: timedelta,
) -> AsyncIterator[OpenAIParts]:
    """Files and batches while the block runs. `folder` is this process's own, for what is on its way; what
    killed ones left beside it is removed after a day. `kept`: how long a batch is known after its end."""
    await asyncio.to_thread(_clear, folder.parent)
    files = Files(jobs.ready, clock, folder, max_bytes=max_file_bytes)
    steps = OpenAISteps(
        backend=jobs.ready, files=files, jobs=jobs, catalogue=catalogue, keys=keys, clock=clock
    )
    batches = OpenAIBatches(jobs.ready, files, clock, steps.wake)
    tasks = [asyncio.create_task(steps.running(), name=f"openai-batches-{n}") for n in range(_AT_ONCE)]
    tasks.append(asyncio.create_task(files.sweeping(), name="files-sweep"))
    tasks.append(asyncio.create_task(_forgetting(batches, clock, kept), name="openai-batches-retention"))
    try:
        yield OpenAIParts(files, batches, jobs)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _forgetting(batches: OpenAIBatches, clock: Clock, kept: timedelta) -> None:
    """Remove old batches again and again, until cancelled."""
    while True:
        try:
            while await batches.forget(clock.now() - kept) == FORGOTTEN_AT_ONCE:
                pass
        except HeadraceError as error:
            log.warning("old_openai_batches_stay", reason=error.message)
        except Exception:
            log.exception("old_openai_batches_stay")
        await asyncio.sleep(_FORGET_S)


def _clear(parent: Path) -> None:
    for folder in parent.glob("*"):
        if time.time() - folder.stat().st_mtime > _LEFT_S:
            shutil.rmtree(folder, ignore_errors=True)
