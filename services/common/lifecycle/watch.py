"""Keeps health true while a service runs, by asking its parts now and then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import structlog

from services.common.errors import HeadraceError
from services.common.lifecycle.health import Health

log = structlog.get_logger(__name__)

_EVERY_S = 2.0
_WITHIN_S = 5.0


@asynccontextmanager
async def watched(health: Health, checks: Mapping[str, Callable[[], Awaitable[None]]]) -> AsyncIterator[None]:
    """Keep the parts named in `checks` ready while their check returns, unready while it raises or takes
    longer than 5 s; each is asked every 2 s, and once before the block begins."""

    async def look() -> None:
        for part, check in checks.items():
            try:
                async with asyncio.timeout(_WITHIN_S):
                    await check()
            except (HeadraceError, TimeoutError) as error:
                health.set_unready(part, str(error) or "no answer")
            except Exception:
                # A task that ended here would leave every part as it was, for ever.
                log.exception("check_failed", part=part)
                health.set_unready(part, "it cannot be checked; the log says why")
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
