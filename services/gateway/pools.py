"""What the workers of each pool say of themselves: how fast they run a version, and whether they have it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from google.protobuf.message import DecodeError
from headrace.v1.control_pb2 import LoadedVersion, ServingTotals, WorkerStatus

from services.common.bus import Bus, Table
from services.common.clock import Clock
from services.common.topics import GUEST, WORKERS

_GUEST: Final = GUEST.encode()
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


class _Said:
    """A heartbeat that was read, without a look at each of its versions: where they are is mostly known from
    the one `before`, and they are thousands."""

    __slots__ = ("_searched", "places", "status")

    def __init__(self, status: WorkerStatus, before: _Said | None) -> None:
        self.status = status
        #: Where versions were, in this heartbeat or an earlier one.
        self.places: dict[str, int] = before.places if before is not None else {}
        self._searched = False

    def find(self, model: str, version: str) -> LoadedVersion | None:
        """What the worker says of a version, None where it says nothing."""
        versions, name = self.status.versions, f"{model}\0{version}"
        place = self.places.get(name, len(versions))
        if place < len(versions):
            loaded: LoadedVersion = versions[place]
            if loaded.model == model and loaded.version == version:
                return loaded
        if self._searched:
            return None
        self.places = {f"{loaded.model}\0{loaded.version}": n for n, loaded in enumerate(versions)}
        self._searched = True
        return versions[self.places[name]] if name in self.places else None


@dataclass(slots=True)
class _Heartbeat:
    """The last one of a worker, by whose `mark` it is known when it comes again. What it said is kept while
    the worker lives: of those that left there are ever more."""

    mark: int
    value: bytes | None  # until it is read
    said: _Said | None  # or what one before it said
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
        # What the living of each pool had said by then.
        self._seen: dict[str, list[_Said]] = {}
        # What guests counted; and of the living, what it said by then.
        self._guests: dict[bytes, _Heartbeat] = {}
        self._counted: list[_Said] = []
        #: Where the records come from.
        self.table: Table | None = None

    def apply(self, key: bytes, value: bytes | None) -> None:
        """Take one record of the topic."""
        is_guest = key.startswith(_GUEST)
        heartbeats = self._guests if is_guest else self._heartbeats
        if value is None:
            heartbeats.pop(key, None)
            return
        known, mark, now = heartbeats.get(key), hash(value), self._clock.monotonic()
        if known is None:
            _living(heartbeats, now)  # who left before it is forgotten, though nobody may ask for long
        if known is None or known.mark != mark:
            came = self.table is not None and self.table.caught_up
            said = known.said if known is not None and came else None
            heartbeats[key] = _Heartbeat(mark, value if came else None, said, now)
            if came and not is_guest:
                if now - self._heard_at > _SETTLING_S:
                    self._heard_since = now
                self._heard_at = now

    def speed(self, pool: str, model: str, version: str) -> Speed:
        """How `version` runs on the workers of `pool`: the median worker's measurements."""
        workers = self._alive(pool)
        found = [worker.find(model, version) for worker in workers]
        measured = sorted(
            (loaded.best_rows_per_s, loaded.best_rows) for loaded in found if loaded and loaded.best_rows
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
        best = _NOBODYS
        for worker in seen:
            loaded = worker.find(model, version)
            if loaded is not None and loaded.artifact_digest == artifact:
                this = _condition(loaded)
                if this is READY:
                    return READY
                if best is _NOBODYS or _RANK[this.state] < _RANK[best.state]:
                    best = this
        return best

    def _look(self, now: float) -> None:
        """Read what the living said; many ask, of many versions."""
        self._looked_at, self._seen = now, {}
        for said in _living(self._heartbeats, now):
            # A deployment without a pool is everybody's.
            for pool in {said.status.pool, ""}:
                self._seen.setdefault(pool, []).append(said)
        self._counted = _living(self._guests, now)

    def totals(self, model: str, version: str, artifact: str) -> list[ServingTotals]:
        """What the living counted of the version, guests among them, whatever their pools."""
        now = self._clock.monotonic()
        if now - self._looked_at > _LOOKED_S:
            self._look(now)
        found = [said.find(model, version) for said in (*self._seen.get("", ()), *self._counted)]
        return [
            loaded.totals
            for loaded in found
            if loaded is not None and loaded.artifact_digest == artifact and loaded.HasField("totals")
        ]

    def names(self) -> list[str]:
        """Pools that have a worker that is alive."""
        living = _living(self._heartbeats, self._clock.monotonic())
        return sorted({said.status.pool for said in living})

    def workers(self, pool: str) -> int:
        """Workers of `pool` that are alive."""
        return len(self._alive(pool))

    def _alive(self, pool: str) -> list[_Said]:
        living = _living(self._heartbeats, self._clock.monotonic())
        return [said for said in living if said.status.pool == pool]


_NOBODYS: Final = Condition(State.UNAVAILABLE, "no worker has it")
_RANK: Final = {State.READY: 0, State.LOADING: 1, State.UNAVAILABLE: 2}


def _condition(loaded: LoadedVersion) -> Condition:
    if loaded.state in _ABLE:
        return READY
    if loaded.state in _COMING and not loaded.error:
        return Condition(State.LOADING)
    return Condition(State.UNAVAILABLE, loaded.error or "it is being unloaded")


def _living(heartbeats: Mapping[bytes, _Heartbeat], now: float) -> list[_Said]:
    """What the living said; of others it is forgotten."""
    found = []
    for heartbeat in heartbeats.values():
        if heartbeat.value is not None:
            heartbeat.said, heartbeat.value = _read(heartbeat.value, heartbeat.said), None
        said = heartbeat.said
        if said is not None and _is_alive(said.status, now - heartbeat.came_at):
            found.append(said)
        else:
            heartbeat.said = None
    return found


def _read(value: bytes, before: _Said | None) -> _Said | None:
    """None where nobody can read it."""
    try:
        return _Said(WorkerStatus.FromString(value), before)
    except DecodeError:
        return None


def _is_alive(status: WorkerStatus, age_s: float) -> bool:
    """Whether who said this `age_s` ago is not gone by now; living guests say that they are."""
    leaves = status.state in (WorkerStatus.STATE_GONE, WorkerStatus.STATE_DRAINING)
    if leaves and not status.worker_id.startswith(GUEST):
        return False
    return age_s <= _ALIVE_INTERVALS * max(status.interval_ms, _LEAST_INTERVAL_MS) / 1000


@asynccontextmanager
async def pools_followed(bus: Bus, clock: Clock) -> AsyncIterator[Pools]:
    """Pools whose workers are heard of while the block runs."""
    pools = Pools(clock)
    async with bus.table(WORKERS, pools.apply) as table:
        pools.table = table
        yield pools
