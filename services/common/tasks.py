"""Tasks that live as long as a block does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

#: A cancellation that was lost is said again after this long.
_AGAIN_S: Final = 1.0


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[asyncio.Task[None]]:
    """`work` beside the block, as a task, ended with it. Raises what it failed of when the block is left."""
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        await ended(task)


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel `task` and wait for its end. Raises what it failed of, but no cancellation of its own."""
    task.cancel()
    # Not `with suppress(CancelledError): await task`: the caller's own cancellation would be lost, and before
    # Python 3.11.3 every later asyncio.timeout of the caller would end it.
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()


async def stopped(*tasks: asyncio.Task[Any]) -> None:
    """Cancel `tasks` until they have ended, whatever they end with. For those that ask what may lose a
    cancellation, as redis-py does while it sends, and that have nothing to do at their end: it would be
    cancelled, too."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _done, left = await asyncio.wait(left, timeout=_AGAIN_S)
