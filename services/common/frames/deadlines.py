"""When calls are late: one timer for all that are pending."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Final

#: Deadlines are checked no more often than this, seconds; since a check looks at all that is pending, the
#: less often the more there is: it takes about 2% of the time at most.
_SWEEP: Final = 0.002
_SWEEP_PER_CALL: Final = 4e-6


class Deadlines:
    """Calls `late` with the id of each pending entry soon after its deadline, the second of its values."""

    __slots__ = ("_late", "_loop", "_pending", "_timer", "next_look")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pending: Mapping[int, tuple[object, float]],
        late: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self._pending = pending
        self._late = late
        self._timer: asyncio.TimerHandle | None = None
        #: A pending entry with an earlier deadline than this wants `look_at`.
        self.next_look = math.inf

    def of(self, local_id: int) -> float | None:
        """The deadline of a pending entry; None where it has none."""
        entry = self._pending.get(local_id)
        return entry[1] if entry is not None and entry[1] != math.inf else None

    def look_at(self, when: float) -> None:
        """Look at all that is pending at `when`, or as soon after it as may be."""
        pause = max(_SWEEP, _SWEEP_PER_CALL * len(self._pending))
        at = max(when, self._loop.time() + pause)
        if at >= self.next_look:
            return  # or a stream of short deadlines would put the look off for ever
        self.stop()
        self.next_look = at
        self._timer = self._loop.call_at(at, self._look)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.next_look = math.inf

    def _look(self) -> None:
        self._timer = None
        self.next_look = math.inf
        now = self._loop.time()
        for local_id in [key for key, (_, deadline) in self._pending.items() if deadline <= now]:
            self._late(local_id)
        upcoming = min([deadline for _, deadline in self._pending.values()], default=math.inf)
        if upcoming < self.next_look:
            self.look_at(upcoming)
