"""Stopping clients without being stopped by them, and telling which of them have stopped by themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.client import AIOKafkaClient

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
#: What a producer has to send what is buffered, which without a broker waits until it expires.
_FLUSH_S = 2.0
_CLOSE_S = 1.0


async def stop_consumer(
    consumer: AIOKafkaConsumer, stop: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Stop `consumer`, by `stop` where it is part of something else, and close its connections. Raises
    nothing but the caller's own cancellation; each of both has STOP_TIMEOUT_S.

    aiokafka waits for the tasks that it cancels. One that rests because its fetch has just failed lets that
    cancellation through, so that whoever stops such a consumer would end as if somebody had cancelled him,
    in silence, and the connections would stay open.
    """
    try:
        await _apart(stop or consumer.stop, STOP_TIMEOUT_S)
    finally:
        # stop() does it last, and may not come that far.
        await _apart(lambda: _close(consumer._client), STOP_TIMEOUT_S)  # noqa: SLF001


async def stop_producer(producer: AIOKafkaProducer) -> None:
    """Stop `producer`, close its connections and end its tasks, within seconds whether or not it could send
    what it holds. Raises nothing but the caller's own cancellation."""
    try:
        await _apart(producer.stop, _FLUSH_S)
    finally:
        await _apart(producer._sender.close, _CLOSE_S)  # noqa: SLF001
        await _apart(lambda: _close(producer.client), _CLOSE_S)


async def _close(client: AIOKafkaClient) -> None:
    """Close its connections. By itself it would raise first what its task has failed of."""
    task = client._sync_task  # noqa: SLF001
    if task is not None and task.done():
        if not task.cancelled():
            task.exception()  # else asyncio reports it as forgotten
        client._sync_task = None  # noqa: SLF001
    await client.close()


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


async def _apart(stop: Callable[[], Awaitable[None]], within_s: float) -> None:
    """Run `stop` in a task of its own: what it ends of stays there."""

    async def stopping() -> None:
        await stop()

    task = asyncio.create_task(stopping(), name="stop a client")
    task.add_done_callback(_noticed)
    try:
        await asyncio.wait({task}, timeout=within_s)
    finally:
        task.cancel()
    if not task.done():
        log.warning("a client did not stop within %g s", within_s)
    elif not task.cancelled() and (error := task.exception()) is not None:
        log.warning("a client did not stop as it should: %r", error)


def _noticed(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # who was cancelled meanwhile does not ask, and asyncio would report it as forgotten
