"""How long a model runs, learned while it runs."""

from __future__ import annotations

from math import inf

# Each measurement counts this much less than the next one: the last fifty or so decide.
_KEEP = 0.98
# An optimistic bound older than this many seconds is forgotten: refusing on the strength of one slow minute
# would leave nothing that could ever measure a faster one.
_FLOOR_LIFE_S = 10.0
# What is expected counts as so many measurements of the pace.
_BEGIN = 10
# A run counts as at most this many times what was expected, plus this many seconds.
_OUTLIER = 4.0
_OUTLIER_S = 1e-4


class RunTime:
    """Run time of a batch as a line over its rows, `fixed + per_row * rows`, in seconds: least squares with
    exponentially fading weights, both coefficients kept non-negative.

    `floor` is the fastest single run lately seen, or what the line says of one row where that is less:
    nothing can be answered sooner."""

    __slots__ = ("_floor_now", "_floor_past", "_n", "_nn", "_nt", "_since", "_t", "_w", "fixed", "per_row")

    def __init__(self) -> None:
        self._w = self._n = self._nn = self._t = self._nt = 0.0
        self._floor_now = self._floor_past = inf
        self._since = 0.0
        self.fixed = 0.0
        self.per_row = 0.0

    def observe(self, rows: int, seconds: float, now: float) -> None:
        """Take in that `rows` rows ran in `seconds`, ending at `now` (any monotonic scale)."""
        if self._w:
            # One run that the machine interrupted says nothing about the model; a model that has really
            # become slower gets there within a few runs.
            # Larger batches than ever may well take as much longer as they are larger.
            expected = max(self.estimate(rows), self._t / self._n * rows)
            seconds = min(seconds, expected * _OUTLIER + _OUTLIER_S)
        self._w = self._w * _KEEP + 1.0
        self._n = self._n * _KEEP + rows
        self._nn = self._nn * _KEEP + rows * rows
        self._t = self._t * _KEEP + seconds
        self._nt = self._nt * _KEEP + rows * seconds
        self._fit()
        if now - self._since > _FLOOR_LIFE_S / 2:
            self._floor_past, self._floor_now, self._since = self._floor_now, inf, now
        self._floor_now = min(self._floor_now, seconds)

    def estimate(self, rows: int) -> float:
        """Seconds that a batch of `rows` rows will take; 0 before the first measurement."""
        return self.fixed + self.per_row * rows

    def floor(self, now: float) -> float:
        """Seconds that any run takes at the very least; 0 when none was measured lately."""
        if now - self._since > _FLOOR_LIFE_S:
            return 0.0
        return min(self._floor_now, self._floor_past, self.estimate(1))

    def _fit(self) -> None:
        weight = self._w
        mean_n, mean_t = self._n / weight, self._t / weight
        variance = self._nn / weight - mean_n * mean_n
        # With all batches of one size lately, a slope cannot be told from the offset: the last known one
        # stays.
        slope = self.per_row
        if variance > 1e-6 * mean_n * mean_n:
            slope = max(0.0, (self._nt / weight - mean_n * mean_t) / variance)
        slope = min(slope, mean_t / mean_n)
        self.per_row = slope
        self.fixed = mean_t - slope * mean_n


class Pace:
    """Seconds per row at which a backlog leaves, whatever it is that takes the time: runs, slots that share
    cores, the event loop between them. Measured only between two releases of which the first left a whole
    batch behind; a version that merely waited for company says nothing."""

    __slots__ = ("_at", "_known_at", "_leaving", "_rows", "_seconds")

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0
        self._leaving = 0
        self._at = self._known_at = -inf

    def left(self, rows: int, now: float, expected: float, *, backlog: bool) -> None:
        """`rows` rows left for a run; `backlog`: a whole batch or more waits behind them. `expected` is the
        pace to begin with: with two slots, every second release follows the one before it at once."""
        if self._leaving:
            if not self._rows:
                self._rows = float(_BEGIN * self._leaving)
                self._seconds = expected * self._rows
            self._rows = self._rows * _KEEP + self._leaving
            self._seconds = self._seconds * _KEEP + now - self._at
            self._known_at = now
        self._leaving, self._at = (rows if backlog else 0), now

    def interrupted(self) -> None:
        """The backlog went some other way: what happens until the next release says nothing."""
        self._leaving = 0

    def per_row(self, now: float, expected: float) -> float:
        """Seconds per row; `expected` where nothing was measured lately."""
        if now - self._known_at > _FLOOR_LIFE_S:
            self._rows = self._seconds = 0.0
            return expected
        return self._seconds / self._rows
