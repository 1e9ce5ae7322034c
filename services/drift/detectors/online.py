"""Change detectors that see one value at a time and keep little: ADWIN and Page-Hinkley."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True)
class _Bucket:
    """`count` consecutive values as their sum and their sum of squared deviations."""

    count: int
    total: float
    deviations: float

    def join(self, newer: _Bucket) -> _Bucket:
        """Both buckets as one (Chan, Golub & LeVeque 1979)."""
        count = self.count + newer.count
        gap = self.total / self.count - newer.total / newer.count
        return _Bucket(
            count,
            self.total + newer.total,
            self.deviations + newer.deviations + gap * gap * self.count * newer.count / count,
        )


class Adwin:
    """Adaptive windowing (Bifet & Gavalda, "Learning from time-changing data with adaptive windowing", 2007).

    Keeps a window as an exponential histogram (at most `max_buckets` buckets of every power of two) and
    drops its older part when the means of any older/newer split differ by more than chance at `delta`.
    Splits are tried every `clock` values once the window is longer than `grace_period`; either side holds at
    least `min_window_length` values. With `restart` the whole window is forgotten after a change, so that one
    change is reported once; without, what is left of the old values may be cut, and reported, later.
    """

    def __init__(
        self,
        *,
        delta: float = 0.002,
        clock: int = 32,
        max_buckets: int = 5,
        min_window_length: int = 5,
        grace_period: int = 10,
        restart: bool = False,
    ) -> None:
        self._delta = delta
        self._clock = clock
        self._max_buckets = max_buckets
        self._min_window_length = min_window_length
        self._grace_period = grace_period
        self._restart = restart
        self._rows: list[list[_Bucket]] = [[]]  # row k: buckets of 2**k values, oldest first
        self._window: _Bucket | None = None
        self._ticks = 0

    @property
    def width(self) -> int:
        """How many values the window holds."""
        return self._window.count if self._window else 0

    @property
    def mean(self) -> float:
        """Mean of the window, 0 while it is empty."""
        return self._window.total / self._window.count if self._window else 0.0

    def update(self, value: float) -> bool:
        """Add one value; whether the window was cut, that is, the mean changed."""
        self._ticks += 1
        self._insert(_Bucket(1, value, 0.0))
        if self._ticks % self._clock or self.width <= self._grace_period:
            return False
        changed = False
        while self._try_cut():
            changed = True
        if changed and self._restart:
            self._rows, self._window, self._ticks = [[]], None, 0
        return changed

    def _insert(self, bucket: _Bucket) -> None:
        self._window = self._window.join(bucket) if self._window else bucket
        self._rows[0].append(bucket)
        for level, row in enumerate(self._rows):
            if len(row) <= self._max_buckets:
                break
            merged = row.pop(0).join(row.pop(0))
            if level + 1 == len(self._rows):
                self._rows.append([])
            self._rows[level + 1].append(merged)

    def _try_cut(self) -> bool:
        """Drop the oldest bucket if some split of the window shows a change."""
        window = self._window
        if window is None:
            return False
        old_count, old_total = 0, 0.0
        for row in reversed(self._rows):
            for bucket in row:
                old_count += bucket.count
                old_total += bucket.total
                new_count = window.count - old_count
                if new_count < self._min_window_length:
                    return False
                if old_count < self._min_window_length:
                    continue
                gap = abs(old_total / old_count - (window.total - old_total) / new_count)
                if gap > self._allowed_gap(old_count, new_count, window):
                    self._drop_oldest()
                    return True
        return False

    def _allowed_gap(self, old_count: int, new_count: int, window: _Bucket) -> float:
        """Theorem 3.2 of the paper with its variance-based bound, over ln(width) splits."""
        shortest = self._min_window_length - 1
        harmonic = 1 / (old_count - shortest) + 1 / (new_count - shortest)
        confidence = math.log(2 * math.log(window.count) / self._delta)
        variance = window.deviations / window.count
        return math.sqrt(2 * harmonic * variance * confidence) + 2 / 3 * confidence * harmonic

    def _drop_oldest(self) -> None:
        while self._rows and not self._rows[-1]:
            self._rows.pop()
        oldest, window = self._rows[-1].pop(0), self._window
        if window is None or window.count == oldest.count:
            self._window, self._rows = None, [[]]
            return
        count, total = window.count - oldest.count, window.total - oldest.total
        gap = oldest.total / oldest.count - total / count
        lost = oldest.deviations + gap * gap * oldest.count * count / window.count
        self._window = _Bucket(count, total, max(0.0, window.deviations - lost))


@dataclass(slots=True)
class PageHinkley:
    """Page's cumulative-sum test for a change of the mean (Page 1954, Hinkley 1971), with forgetting.

    A change is reported when the sum of deviations from the running mean, less `delta` a value, has risen
    (mode "up"), fallen ("down") or either ("both") by more than `threshold`; everything then starts anew.
    """

    min_instances: int = 30
    delta: float = 0.005
    threshold: float = 50.0
    alpha: float = 0.9999
    mode: Literal["up", "down", "both"] = "both"
    _count: int = field(default=0, init=False)
    _mean: float = field(default=0.0, init=False)
    _rise: float = field(default=0.0, init=False)
    _fall: float = field(default=0.0, init=False)
    _lowest: float = field(default=math.inf, init=False)
    _highest: float = field(default=-math.inf, init=False)

    def update(self, value: float) -> bool:
        """Add one value; whether the mean changed."""
        self._count += 1
        self._mean += (value - self._mean) / self._count
        deviation = value - self._mean
        self._rise = self.alpha * self._rise + deviation - self.delta
        self._fall = self.alpha * self._fall + deviation + self.delta
        self._lowest = min(self._lowest, self._rise)
        self._highest = max(self._highest, self._fall)
        if self._count < self.min_instances:
            return False
        up = self.mode != "down" and self._rise - self._lowest > self.threshold
        down = self.mode != "up" and self._highest - self._fall > self.threshold
        if up or down:
            self._start_anew()
        return up or down

    def _start_anew(self) -> None:
        self._count, self._mean, self._rise, self._fall = 0, 0.0, 0.0, 0.0
        self._lowest, self._highest = math.inf, -math.inf
