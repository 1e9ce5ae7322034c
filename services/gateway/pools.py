"""What the workers of each pool say of themselves: how fast they run a version, and whether they have it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from google.protobuf.message import DecodeError
from headrace.v1.control_pb2 import LoadedVersion, WorkerStatus

from services.common.bus import Bus, Table
from services.common.clock import Clock
from services.common.topics import WORKERS

_ALIVE_INTERVALS = 3
_LEAST_INTERVAL_MS = 1000
#: Whoever lives is heard of within this long, once anybody is; and what was read so long ago is read again.
_SETTLING_S: Final = 3.0
_LOOKED_S: Final = 1.0
#: Evicted ones come back for the first request, which waits for it.
_ABLE: Final = frozenset({LoadedVersion.STATE_READY, LoadedVersion.STATE_EVICTED})
_COMING: Final = frozenset({LoadedVersion.STATE_LOADING, LoadedVersion.STATE_WARMING})


@dataclass(frozen=True, slots=True)
class Speed:
    """How a version runs in a pool: `workers` alive, the best batch and the rows per second of one worker; 0:
    nobody measured it yet."""

    workers: int
    best_rows: int
    rows_per_s: float


class State(StrEnum):
    """Of a model repository, as clients of other servers know them."""

    READY = "READY"
    LOADING = "LOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Condition:
    """Whether a version answers, and if not, why."""

    state: State
    reason: str = ""

    @property
    def ready(self) -> bool:
        return self.state is State.READY


READY: Final = Condition(State.READY)

#: Model, version, artifact.
_Key = tuple[str, str, str]


@dataclass(slots=True)
class _Heartbeat:
    """The last one of a worker, by whose `mark` it is known when it comes again. What it said is kept while
    the worker lives: of those that left there are ever more."""

    mark: int
    value: bytes | None
    came_at: float  # monotonic


class Pools:
    """Follows control.workers.v1. Heartbeats come every second and are rarely looked at, so they are read
    when somebody asks.

    Alive is who was heard of lately by this process's own clock: those of workers may say anything. So what
    the topic held before it was followed is of nobody alive, until their next heartbeat; nor are the same
    words again, which come where the topic is read from its start once more."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heartbeats: dict[bytes, _Heartbeat] = {}
        # When anybody was heard of last, and since when without a pause.
        self._heard_at = self._heard_since = -math.inf
        self._looked_at = -math.inf
        # The best that the workers of each pool had to say of a version.
        self._seen: dict[str, dict[_Key, Condition]] = {}
        #: Where the records come from.
        self.table: Table | None = None

    def apply(self, key: bytes, value: bytes | None) -> None:
        """Take one record of the topic."""
        if value is None:
            self._heartbeats.pop(key, None)
            return
        known, mark = self._heartbeats.get(key), hash(value)
        if known is None:
            self._alive("")  # who left before it is forgotten, though nobody may ask for long
        if known is None or known.mark != mark:
            came, now = self.table is not None and self.table.caught_up, self._clock.monotonic()
            self._heartbeats[key] = _Heartbeat(mark, value if came else None, now)
            if came:
                if now - self._heard_at > _SETTLING_S:
                    self._heard_since = now
                self._heard_at = now

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

    def condition(self, pool: str, model: str, version: str, artifact: str) -> Condition:
        """Whether a worker of `pool` has the version. Ready where that is not known, just after the start and
        while nobody is heard of, as when the broker is away: requests need none of it."""
        now = self._clock.monotonic()
        if now - self._heard_at > _SETTLING_S or now - self._heard_since < _SETTLING_S:
            return READY
        if now - self._looked_at > _LOOKED_S:
            self._look(now)
        seen = self._seen.get(pool)
        if seen is None:
            whose = f" of pool {pool!r}" if pool else ""
            return Condition(State.UNAVAILABLE, f"no worker{whose} is alive")
        return seen.get((model, version, artifact)) or _NOBODYS

    def _look(self, now: float) -> None:
        """Read what the living said; many ask, of many versions."""
        self._looked_at, self._seen = now, {}
        for status in self._living(now):
            # A deployment without a pool is everybody's.
            pools = {pool: self._seen.setdefault(pool, {}) for pool in (status.pool, "")}
            for loaded in status.versions:
                key = (loaded.model, loaded.version, loaded.artifact_digest)
                this = _condition(loaded)
                for found in pools.values():
                    known = found.get(key)
                    if known is None or _RANK[this.state] < _RANK[known.state]:
                        found[key] = this

    def workers(self, pool: str) -> int:
        """Workers of `pool` that are alive."""
        return len(self._alive(pool))

    def _alive(self, pool: str) -> list[WorkerStatus]:
        return [status for status in self._living(self._clock.monotonic()) if status.pool == pool]

    def _living(self, now: float) -> list[WorkerStatus]:
        found = []
        for heartbeat in self._heartbeats.values():
            status = None if heartbeat.value is None else _of_living(heartbeat.value, now - heartbeat.came_at)
            if status is None:
                heartbeat.value = None
            else:
                found.append(status)
        return found


_NOBODYS: Final = Condition(State.UNAVAILABLE, "no worker has it")
_RANK: Final = {State.READY: 0, State.LOADING: 1, State.UNAVAILABLE: 2}


def _condition(loaded: LoadedVersion) -> Condition:
    if loaded.state in _ABLE:
        return READY
    if loaded.state in _COMING and not loaded.error:
        return Condition(State.LOADING)
    return Condition(State.UNAVAILABLE, loaded.error or "it is being unloaded")


def _of_living(value: bytes, age_s: float) -> WorkerStatus | None:
    """What a heartbeat said `age_s` ago; None where whoever said it is gone by now, or nobody can read it."""
    try:
        status = WorkerStatus.FromString(value)
    except DecodeError:
        return None
    most_s = _ALIVE_INTERVALS * max(status.interval_ms, _LEAST_INTERVAL_MS) / 1000
    gone = status.state in (WorkerStatus.STATE_GONE, WorkerStatus.STATE_DRAINING)
    return None if gone or age_s > most_s else status


@asynccontextmanager
async def pools_followed(bus: Bus, clock: Clock) -> AsyncIterator[Pools]:
    """Pools whose workers are heard of while the block runs."""
    pools = Pools(clock)
    async with bus.table(WORKERS, pools.apply) as table:
        pools.table = table
        yield pools
