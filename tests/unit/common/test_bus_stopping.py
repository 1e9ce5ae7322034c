"""Who stops a consumer goes on, whatever the consumer is in the middle of."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from services.common.bus import stopping
from services.common.bus.stopping import stop_consumer


class _Client:
    _sync_task = None

    def __init__(self) -> None:
        self.closed = 0

    async def close(self) -> None:
        self.closed += 1


class _Consumer:
    """Stops as it is told to."""

    def __init__(self, stop: Callable[[], Awaitable[None]]) -> None:
        self._client = _Client()
        self._stop = stop

    async def stop(self) -> None:
        await self._stop()

    @property
    def closed(self) -> int:
        return self._client.closed


def consumer_that(stop: Callable[[], Awaitable[None]]) -> Any:
    return _Consumer(stop)


async def cancelled() -> None:
    raise asyncio.CancelledError


async def failing() -> None:
    raise RuntimeError("no")


async def never_ending() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("stop", [cancelled, failing, never_ending])
async def test_the_caller_goes_on_and_connections_are_closed(
    stop: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "STOP_TIMEOUT_S", 0.01)
    consumer = consumer_that(stop)
    await stop_consumer(consumer)
    assert consumer.closed == 1


async def test_what_a_consumer_is_part_of_stops_it() -> None:
    consumer, parts = consumer_that(failing), []

    async def whole() -> None:
        parts.append("stopped")

    await stop_consumer(consumer, whole)
    assert (parts, consumer.closed) == (["stopped"], 1)


async def test_the_callers_own_cancellation_is_its_own() -> None:
    began = asyncio.Event()
    ends: list[str] = []

    async def stop() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("stop")

    consumer = consumer_that(stop)
    caller = asyncio.create_task(stop_consumer(consumer))
    await began.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await asyncio.sleep(0)
    assert (ends, consumer.closed) == (["stop"], 1)
