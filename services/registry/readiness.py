"""Whether the registry can do its work now. The broker is not asked: what is committed reaches it later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from services.common.db import check_database
from services.common.errors import HeadraceError
from services.common.lifecycle import Health
from services.registry.edge import Edge

_EVERY_S = 2.0
_WITHIN_S = 5.0


@asynccontextmanager
async def watched(edge: Edge, health: Health) -> AsyncIterator[None]:
    """Keep the parts `database` and `artifact_store` of `health` true while the block runs."""
    checks: dict[str, Callable[[], Awaitable[None]]] = {
        "database": lambda: check_database(edge.engine),
        "artifact_store": edge.store.check,
    }

    async def look() -> None:
        for part, check in checks.items():
            try:
                async with asyncio.timeout(_WITHIN_S):
                    await check()
            except (HeadraceError, TimeoutError) as error:
                health.set_unready(part, str(error) or "no answer")
            else:
                health.set_ready(part)

    async def keep_looking() -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            await look()

    await look()
    task = asyncio.create_task(keep_looking(), name="readiness")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
