"""What only one replica does at a time."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from services.analytics import repository
from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError
from services.common.ids import new_id

log = structlog.get_logger(__name__)

#: How long the right to something lasts; it is renewed after a third of that.
LEASE_S = 30.0

#: When to ask again where another replica holds it.
LEASE_WAIT_S = 3.0


class Lease:
    """The right to do `name` for `lasts_s`, renewed by asking. Who is killed keeps it to its end."""

    def __init__(self, engine: AsyncEngine, clock: Clock, name: str, lasts_s: float = LEASE_S) -> None:
        self._engine = engine
        self._clock = clock
        self._name = name
        self._lasts = timedelta(seconds=lasts_s)
        self._holder = new_id()
        self._held_until = float("-inf")

    async def held(self) -> bool:
        """Whether it is this process that does it now; no while the database is away."""
        now = self._clock.monotonic()
        if now < self._held_until:
            return True
        try:
            if await self._hold(self._lasts):
                self._held_until = now + self._lasts.total_seconds() / 3
                return True
        except HeadraceError as error:
            log.info("lease_later", name=self._name, reason=error.message)
        except Exception:
            log.exception("lease_failed", name=self._name)
        return False

    async def give_back(self) -> None:
        """Let another one do it at once; where that fails, when the lease ends."""
        self._held_until = float("-inf")
        with suppress(Exception):
            await self._hold(-self._lasts)

    async def _hold(self, lease: timedelta) -> bool:
        now = self._clock.now()
        async with transaction(self._engine) as session:
            return await repository.hold(session, self._name, self._holder, now, now + lease)
