"""Lines of log about what may happen a thousand times a second: one now and then says how many there were."""

from __future__ import annotations

from math import inf


class Seldom:
    """Says of each time whether it is told: the first one, and then one in `every_s` seconds at most."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._told_at = -inf
        self._untold = 0

    def due(self, now: float) -> int | None:
        """How many times were not told since the last that was; None: nor is this one. `now` is monotonic,
        seconds."""
        if now - self._told_at < self._every_s:
            self._untold += 1
            return None
        untold, self._untold, self._told_at = self._untold, 0, now
        return untold
