"""Tells the routers what this worker has, every interval and at once when it changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import structlog
from headrace.v1.control_pb2 import WorkerStatus

from services.common.bus import Record
from services.common.errors import HeadraceError
from services.common.topics import WORKERS

log = structlog.get_logger(__name__)

_LAST_S = 2.0


class Publisher(Protocol):
    """The part of the bus that a heartbeat needs."""

    async def publish(self, records: Sequence[Record]) -> None: ...


class Heartbeat:
    """Publishes a worker's status to control.workers.v1. Only the newest matters, so nothing queues up while
    the broker is away."""

    def __init__(self, bus: Publisher, *, interval: float = 1.0) -> None:
        self._bus = bus
        self._interval = interval
        self._changed = asyncio.Event()
        self._sequence = 0
        self._reached = True

    def changed(self) -> None:
        """Say so now rather than at the next interval."""
        self._changed.set()

    async def run(self, status: Callable[[], WorkerStatus]) -> None:
        """Beat until cancelled; `status` is asked each time."""
        while True:
            self._changed.clear()
            try:
                await self.beat(status())
            except HeadraceError as error:
                if self._reached:
                    log.warning("heartbeat_failed", reason=error.message)
                self._reached = False
            except Exception:
                # Routers would take a worker that says nothing more for gone, and nobody here would notice.
                log.exception("heartbeat_failed")
                self._reached = False
            else:
                self._reached = True
            with suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it can lose a cancellation.
                async with asyncio.timeout(self._interval):
                    await self._changed.wait()

    async def last(self, status: WorkerStatus) -> None:
        """Publish `status`, for 2 s at most: the process ends whether or not the broker listens."""
        with suppress(TimeoutError, HeadraceError):
            async with asyncio.timeout(_LAST_S):
                await self.beat(status)

    async def beat(self, status: WorkerStatus) -> None:
        """Publish `status`, numbered. Raises Unavailable when the broker does not take it."""
        self._sequence += 1
        status.sequence = self._sequence
        status.interval_ms = round(self._interval * 1e3)
        key = status.worker_id.encode()
        await self._bus.publish([Record(WORKERS.name, key, status.SerializeToString())])
