"""Time as a dependency, so that tests can hold it still."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
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


class Leaps:
    """Whether the wall clock was set forward while this process ran."""

    def __init__(self, clock: Clock, slack_s: float) -> None:
        """Differences below `slack_s` between two questions are what the two scales run apart."""
        self._clock = clock
        self._slack = timedelta(seconds=slack_s)
        self._seen = clock.monotonic(), clock.now()

    def forward(self) -> timedelta:
        """By how much since it was last asked; a machine that was asleep looks the same. Zero where it was
        not, or was set back."""
        then, wall = self._seen
        self._seen = monotonic, now = self._clock.monotonic(), self._clock.now()
        leap = now - wall - timedelta(seconds=monotonic - then)
        return leap if leap > self._slack else timedelta()


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
        self.set(seconds)

    def set(self, seconds: float) -> None:
        """Set the wall clock forward by `seconds`, or back where they are negative."""
        self._unix_us += round(seconds * 1e6)
