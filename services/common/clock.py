"""Time as a dependency, so that tests can hold it still."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Where time comes from. Durations are seconds; wall time is microseconds since the Unix epoch."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start, never going back. The same scale as the event loop's time."""
        ...

    def unix_us(self) -> int:
        """Microseconds since the Unix epoch."""
        ...

    def now(self) -> datetime:
        """The same moment as an aware UTC datetime."""
        ...


class SystemClock:
    """The machine's own clocks."""

    monotonic = staticmethod(time.monotonic)

    def unix_us(self) -> int:
        return time.time_ns() // 1000

    def now(self) -> datetime:
        return datetime.now(UTC)


class ManualClock:
    """A clock for tests that stands still until `advance` is called."""

    def __init__(self, start_unix_us: int = 1_750_000_000_000_000) -> None:
        self._unix_us = start_unix_us
        self._monotonic = 0.0

    def monotonic(self) -> float:
        return self._monotonic

    def unix_us(self) -> int:
        return self._unix_us

    def now(self) -> datetime:
        return datetime.fromtimestamp(self._unix_us / 1e6, UTC)

    def advance(self, seconds: float) -> None:
        """Move both scales forward by `seconds`."""
        self._monotonic += seconds
        self._unix_us += round(seconds * 1e6)
