"""Stopping consumers without being stopped by them, and telling which clients have stopped by themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

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


def has_broken(client: AIOKafkaConsumer | AIOKafkaProducer) -> bool:
    """Whether a task has ended without which `client` reads or sends no more. aiokafka tells nobody, or the
    same again and again, and goes on as if nothing came.

    Its tasks expect errors of its own only. On uvloop a connection that was just reset raises a RuntimeError
    where something is sent before the client has seen it.
    """
    if isinstance(client, AIOKafkaProducer):
        return _ended(client.client._sync_task) or _ended(client._sender.sender_task)  # noqa: SLF001
    group = client._coordinator  # noqa: SLF001
    of_group = [getattr(group, name, None) for name in ("_heartbeat_task", "_commit_refresh_task")]
    return (
        any(_ended(task) for task in (client._client._sync_task, client._fetcher._fetch_task))  # noqa: SLF001
        or _ended(getattr(group, "_coordination_task", None))
        # These end when they are no longer needed, too.
        or any(_ended(task) and not task.cancelled() and task.exception() for task in of_group if task)
    )


def _ended(task: asyncio.Task[None] | None) -> bool:
    return task is not None and task.done()


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
