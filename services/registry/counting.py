"""How often what there is of each kind is counted."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from services.common.clock import Clock

#: What was counted is counted again after so many times as long as it took.
_RESTS: Final = 50
#: And at the latest after so many seconds: a database that hung once may be quick again.
_MOST_S: Final = 60.0


class Counting:
    """Counts at every look while that is quick, and ever more seldom the longer it takes: of trials that are
    over there are ever more, and only a metric is about them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due_at = -math.inf

    async def ask(self, count: Callable[[], Awaitable[Mapping[str, int]]]) -> Mapping[str, int] | None:
        """What `count` gives; None where it is not time yet."""
        began = self._clock.monotonic()
        if began < self._due_at:
            return None
        counts = await count()
        ended = self._clock.monotonic()
        self._due_at = ended + min(_MOST_S, _RESTS * (ended - began))
        return counts
