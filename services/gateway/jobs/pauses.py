"""How long whoever looks for work in the database waits between two looks."""

from __future__ import annotations

from services.common.clock import Clock

#: After so long without work.
QUIET_AFTER_S = 30.0
#: How many times as long.
_LONGER = 2.5


class Pauses:
    """Short while there is work now and then, longer once there was none for a while. Looks only find what
    nobody here was woken for: what is due later, and what another gateway has left."""

    def __init__(self, clock: Clock, shortest_s: float) -> None:
        self._clock = clock
        self._shortest_s = shortest_s
        self._worked_at = clock.monotonic()

    def worked(self) -> None:
        """There was work, or somebody said that there is."""
        self._worked_at = self._clock.monotonic()

    def next_s(self) -> float:
        """Seconds until the next look."""
        quiet = self._clock.monotonic() - self._worked_at >= QUIET_AFTER_S
        return self._shortest_s * _LONGER if quiet else self._shortest_s
