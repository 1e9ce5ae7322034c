"""How fast a job goes, from what it came to so far."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Protocol

#: Seconds over which the rate is averaged.
_MEMORY_S = 15.0
_LEAST_S = 0.001


class Progress(Protocol):
    """What is known of a job's speed; JobRow has it."""

    @property
    def completed(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def rate(self) -> float | None: ...
    @property
    def rate_at(self) -> datetime | None: ...
    @property
    def in_progress_at(self) -> datetime | None: ...
    @property
    def ended_at(self) -> datetime | None: ...


def updated_rate(job: Progress, rows: int, now: datetime) -> float | None:
    """Rows per second after `rows` more were done at `now`: an exponentially weighted mean in time, the mean
    since the start while the job is younger than that; None while nothing can be said."""
    began = job.in_progress_at or now
    if began > now:  # the clock was set back: nothing is known until it is there again
        return job.rate
    elapsed = max(_LEAST_S, (now - began).total_seconds())
    if job.rate is None or job.rate_at is None or elapsed <= _MEMORY_S:
        return (job.completed + job.failed + rows) / elapsed
    since = max(_LEAST_S, (now - job.rate_at).total_seconds())
    kept = math.exp(-since / _MEMORY_S)
    return job.rate * kept + rows / since * (1 - kept)


def rows_per_s(job: Progress, now: datetime) -> float | None:
    """The rate to show: of the whole job once it ended; while nothing comes, it falls."""
    if job.in_progress_at is None or not job.completed + job.failed:
        return None
    if job.ended_at is not None:
        if job.ended_at < job.in_progress_at:  # by a clock that was set back between
            return None
        whole = max(_LEAST_S, (job.ended_at - job.in_progress_at).total_seconds())
        return (job.completed + job.failed) / whole
    if job.rate is None or job.rate_at is None:
        return None
    silent = (now - job.rate_at).total_seconds()
    return job.rate * math.exp(-max(0.0, silent - _MEMORY_S) / _MEMORY_S)


def time_left_s(total: int | None, done: int, rate: float | None) -> float | None:
    """Seconds until all rows are done at this rate."""
    if total is None or rate is None or rate <= 0:
        return None
    return max(0, total - done) / rate
