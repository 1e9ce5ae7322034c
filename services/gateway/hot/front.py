"""What the connections of one listener share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.gateway.hot.heads import KnownHeads
from services.gateway.predict import PredictService

if TYPE_CHECKING:
    from services.gateway.hot.deadlines import TimedProtocol


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of one HTTP connection. Durations are whole seconds; the sweep enforces them to the second."""

    keep_alive_s: int = 75
    #: From the first byte of a request to the end of its headers.
    head_s: int = 10
    #: For the body of a hot request; for other bodies the longest silence.
    body_s: int = 30
    #: How long a client may leave answers unread.
    unread_s: int = 30
    #: How long the rest of a refused body is read and thrown away, so that its sender sees the answer.
    linger_s: int = 5
    #: While draining: silence after which a connection is closed. After a shorter one a request may be on its
    #: way, which closing would reset.
    drain_idle_s: int = 2
    max_head_bytes: int = 64 << 10
    max_headers: int = 128
    #: Connections beyond are answered 503 and closed; a tenth more, and they are closed unanswered.
    max_connections: int = 10_000


class HotFront:
    """The connections, their limits, and whether the process is draining."""

    def __init__(self, service: PredictService, limits: HttpLimits, *, hot: bool = True) -> None:
        """`hot` False hands every request to ASGI, with the same deadlines and limits."""
        self.service = service
        self.limits = limits
        self.hot = hot
        self.draining = False
        self.connections: set[TimedProtocol] = set()
        self.heads = KnownHeads()

    @asynccontextmanager
    async def sweeping(self, every_s: float = 1.0) -> AsyncIterator[None]:
        """Enforce the deadlines of all connections while the block runs. One sweep a second in place of a
        timer per request: timers would cost more than parsing does."""

        async def sweep() -> None:
            while True:
                await asyncio.sleep(every_s)
                for connection in list(self.connections):
                    connection.tick()

        task = asyncio.create_task(sweep(), name="http-deadlines")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
