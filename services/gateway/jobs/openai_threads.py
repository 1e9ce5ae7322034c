"""What comes on the event loop, for a thread that goes through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_ITEM_S = 60.0


def items_in_thread(loop: asyncio.AbstractEventLoop, items: AsyncIterator[T]) -> Iterator[T]:
    """`items` of `loop`, for a thread. Raises TimeoutError where one takes longer than a minute."""
    ended: Any = object()

    async def following() -> Any:
        return await anext(items, ended)

    while True:
        item = asyncio.run_coroutine_threadsafe(following(), loop).result(_ITEM_S)
        if item is ended:
            return
        yield item


async def no_items() -> AsyncIterator[Any]:
    """Where there is nothing to go through."""
    items: tuple[Any, ...] = ()
    for item in items:
        yield item
