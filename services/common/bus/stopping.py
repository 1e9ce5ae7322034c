"""Stopping consumers without being stopped by them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiokafka import AIOKafkaConsumer

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0


async def stop_consumer(
    consumer: AIOKafkaConsumer, stop: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Stop `consumer`, by `stop` where it is part of something else, and close its connections. Raises
    nothing but the caller's own cancellation; each of both has STOP_TIMEOUT_S.

    aiokafka waits for the tasks that it cancels. One that rests because its fetch has just failed lets that
    cancellation through, so that whoever stops such a consumer would end as if somebody had cancelled him,
    in silence, and the connections would stay open.
    """
    await _apart(stop or consumer.stop)
    await _apart(consumer._client.close)  # noqa: SLF001 - stop() does it last, and may not come that far


async def _apart(stop: Callable[[], Awaitable[None]]) -> None:
    """Run `stop` in a task of its own: what it ends of stays there."""

    async def stopping() -> None:
        await stop()

    task = asyncio.create_task(stopping(), name="stop a consumer")
    try:
        await asyncio.wait({task}, timeout=STOP_TIMEOUT_S)
    finally:
        task.cancel()
    if not task.done():
        log.warning("a consumer did not stop within %g s", STOP_TIMEOUT_S)
    elif not task.cancelled() and (error := task.exception()) is not None:
        log.warning("a consumer did not stop as it should: %r", error)
