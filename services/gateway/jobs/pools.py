"""What the workers of each pool say of themselves, as far as jobs need it."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.v1.control_pb2 import WorkerStatus

from services.common.bus import Table
from services.common.clock import Clock

_ALIVE_INTERVALS = 3
_LEAST_INTERVAL_MS = 1000


@dataclass(frozen=True, slots=True)
class Speed:
    """How a version runs in a pool: `workers` alive, the best batch and the rows per second of one worker; 0:
    nobody measured it yet."""

    workers: int
    best_rows: int
    rows_per_s: float


@dataclass(frozen=True, slots=True)
class _Heartbeat:
    value: bytes
    came_at: float  # monotonic; -inf: before anybody listened


class Pools:
    """Follows control.workers.v1. Heartbeats come every second and are rarely looked at, so they are read
    when somebody asks.

    Alive is who was heard of lately by this process's own clock: those of workers may say anything. So what
    the topic held before it was followed is of nobody alive, until their next heartbeat; nor are the same
    words again, which come where the topic is read from its start once more."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heartbeats: dict[bytes, _Heartbeat] = {}
        #: Where the records come from.
        self.table: Table | None = None

    def apply(self, key: bytes, value: bytes | None) -> None:
        """Take one record of the topic."""
        if value is None:
            self._heartbeats.pop(key, None)
            return
        known = self._heartbeats.get(key)
        if known is None or known.value != value:
            came = self.table is not None and self.table.caught_up
            self._heartbeats[key] = _Heartbeat(value, self._clock.monotonic() if came else float("-inf"))

    def speed(self, pool: str, model: str, version: str) -> Speed:
        """How `version` runs on the workers of `pool`: the median worker's measurements."""
        workers = self._alive(pool)
        measured = sorted(
            (loaded.best_rows_per_s, loaded.best_rows)
            for worker in workers
            for loaded in worker.versions
            if loaded.model == model and loaded.version == version and loaded.best_rows
        )
        if not measured:
            return Speed(len(workers), 0, 0.0)
        rows_per_s, best_rows = measured[len(measured) // 2]
        return Speed(len(workers), best_rows, rows_per_s)

    def workers(self, pool: str) -> int:
        """Workers of `pool` that are alive."""
        return len(self._alive(pool))

    def _alive(self, pool: str) -> list[WorkerStatus]:
        now = self._clock.monotonic()
        found = []
        for heartbeat in self._heartbeats.values():
            status = WorkerStatus.FromString(heartbeat.value)
            most_s = _ALIVE_INTERVALS * max(status.interval_ms, _LEAST_INTERVAL_MS) / 1000
            gone = status.state in (WorkerStatus.STATE_GONE, WorkerStatus.STATE_DRAINING)
            if status.pool == pool and not gone and now - heartbeat.came_at <= most_s:
                found.append(status)
        return found
