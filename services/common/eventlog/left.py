"""Events that a process of another name left on disk: published by whoever came in its place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

from services.common.bus import Bus
from services.common.clock import Clock
from services.common.errors import FailedPrecondition
from services.common.eventlog.log import EventLog, Join
from services.common.tasks import ended

log = logging.getLogger(__name__)

#: How long the directory is held at a time: who comes back under that name needs it.
_WITHIN_S = 2.0


@asynccontextmanager
async def publishing_left(
    directory: Path, bus: Bus, topic: str, *, clock: Clock, join: Join | None = None
) -> AsyncIterator[None]:
    """`publish_left` while the block runs."""
    task = asyncio.create_task(
        publish_left(directory, bus, topic, clock=clock, join=join), name=f"left in {directory.parent.name}"
    )
    try:
        yield
    finally:
        await ended(task)


async def publish_left(
    directory: Path, bus: Bus, topic: str, *, clock: Clock, join: Join | None = None, every_s: float = 30.0
) -> NoReturn:
    """Publish what is in the event log at `directory`, again and again until cancelled, whenever no process
    has it. Nothing is made where there is none."""
    while True:
        await asyncio.sleep(every_s)
        try:
            if await asyncio.to_thread(_something, directory):
                await _publish(EventLog(directory, bus, topic, clock=clock, join=join), clock)
        except FailedPrecondition:
            continue  # whose it is lives
        except Exception:
            log.exception("what an earlier process left in %s cannot be published", directory)


async def _publish(events: EventLog, clock: Clock) -> None:
    await events.start()
    try:
        found = events.pending_records
    finally:
        await events.close(clock.monotonic() + _WITHIN_S)
    if found:
        done = found - events.pending_records
        log.info("published %d of %d records that an earlier process left", done, found)


def _something(directory: Path) -> bool:
    """Whether there may be events. Blocking."""
    return any(path.stat().st_size for path in directory.glob("*.log"))
