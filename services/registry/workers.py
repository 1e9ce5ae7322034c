"""Which workers are alive and what they have loaded, from their heartbeats on `control.workers.v1`."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog
from headrace.v1.control_pb2 import LoadedVersion, ServingConfig, WorkerStatus

from services.common.bus import Bus, Record, Table
from services.common.clock import Clock
from services.common.errors import HeadraceError
from services.common.tasks import running
from services.common.topics import WORKERS
from services.registry.rollout_plan import Readiness
from services.registry.schemas import storable

log = structlog.get_logger(__name__)

#: A worker that was not heard of for so many of its intervals is gone.
MISSED: Final = 3
#: Intervals within which all that live are heard of after the first of them, and seconds, at most.
_ROUND: Final = 1.5
_MOST_ROUND_S: Final = 1.5
_LIVE: Final = frozenset({WorkerStatus.STATE_STARTING, WorkerStatus.STATE_READY})
#: Minutes without a word, while others are heard, after which a worker's record is deleted. So many, since
#: routers go on with a worker that only the broker does not hear. One that speaks after all is known again.
FORGOTTEN_MINUTES: Final = 360
_MINUTE_S = 60.0
_FORGOTTEN_AT_ONCE: Final = 1000


#: Model, version, artifact.
_Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class _Heard:
    status: WorkerStatus
    until: float  # monotonic
    #: Why it could not load what it has not loaded since, also while it tries again.
    failures: Mapping[_Key, str] = field(default_factory=dict)


class Workers:
    """The last heartbeat of every worker that is alive.

    Whoever follows the topic from its start is told the last words of workers long dead as well: only what
    came after that counts, so that a registry that has just started knows of nobody for an interval. The same
    words again are no heartbeat: after a fault the topic is read from its start once more. Who is heard of
    first, after the start or a broker that was away, does not speak for the others: see Readiness.settling.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        #: What the topic holds of every worker, dead ones included, of which there are ever more: its hash.
        self._said: dict[str, int] = {}
        #: For how many minutes nothing else came of those.
        self._silent: dict[str, int] = {}
        self._is_anybody_heard = False
        self._settled_at = -math.inf
        self.table: Table | None = None

    def apply(self, key: bytes, value: bytes | None) -> None:
        """One record of the topic."""
        worker_id = key.decode()
        if value is None:
            self._heard.pop(worker_id, None)
            self._said.pop(worker_id, None)
            self._silent.pop(worker_id, None)
            return
        mark = hash(value)
        again = self._said.get(worker_id) == mark
        self._said[worker_id] = mark
        if self.table is not None and self.table.caught_up and not again:
            self._silent.pop(worker_id, None)
            self._is_anybody_heard = True
            self.hear(worker_id, WorkerStatus.FromString(value))

    def hear(self, worker_id: str, status: WorkerStatus) -> None:
        """A heartbeat, now."""
        if status.state in _LIVE:
            now, interval_s = self._clock.monotonic(), max(status.interval_ms, 1) / 1000
            self._forget_silent(now)
            if not self._heard:
                self._settled_at = now + min(_ROUND * interval_s, _MOST_ROUND_S)
            until = now + MISSED * interval_s
            before = self._heard.get(worker_id)
            failures = _failures(status, before.failures if before is not None else {})
            self._heard[worker_id] = _Heard(status, until, failures)
        else:
            self._heard.pop(worker_id, None)

    def readiness(self, config: ServingConfig, version: str) -> Readiness:
        """How far the workers of `config`'s pool are with `version` of its model."""
        now = self._clock.monotonic()
        self._forget_silent(now)
        digest = next((v.artifact_digest for v in config.versions if v.version == version), "")
        ready, workers, failed, error, no_room = 0, 0, 0, "", ""
        for worker_id, heard in sorted(self._heard.items()):
            if heard.status.pool != config.pool:
                continue
            workers += 1
            # The same artifact only; it may be there twice, on its way out and on its way in again.
            states = {
                loaded.state: loaded.error
                for loaded in heard.status.versions
                if (loaded.model, loaded.version, loaded.artifact_digest) == (config.model, version, digest)
            }
            ready += LoadedVersion.STATE_READY in states
            if LoadedVersion.STATE_READY in states:
                continue
            reason = heard.failures.get((config.model, version, digest))
            if reason is not None:
                failed += 1
                error = error or storable(f"{worker_id}: {reason or 'no reason given'}")
            out = states.get(LoadedVersion.STATE_EVICTED)
            if out is not None and not no_room:
                no_room = storable(f"{worker_id}: {out or 'it made room for another version'}")
        return Readiness(workers, ready, error, no_room, failed, settling=now < self._settled_at)

    def is_ready(self, config: ServingConfig, version: str) -> bool:
        """Whether some worker of `config`'s pool can answer for `version` of its model."""
        return self.readiness(config, version).ready > 0

    def gone(self) -> list[str]:
        """Whose last words nobody needs any more; asked once a minute. One in which nobody says anything, as
        when the broker is away, counts for nobody."""
        if self._is_anybody_heard:
            for worker_id in self._said:
                self._silent[worker_id] = self._silent.get(worker_id, 0) + 1
        self._is_anybody_heard = False
        gone = [worker_id for worker_id, minutes in self._silent.items() if minutes >= FORGOTTEN_MINUTES]
        return gone[:_FORGOTTEN_AT_ONCE]

    def _forget_silent(self, now: float) -> None:
        for worker_id in [name for name, heard in self._heard.items() if heard.until < now]:
            del self._heard[worker_id]


def _failures(status: WorkerStatus, before: Mapping[_Key, str]) -> dict[_Key, str]:
    """What cannot be loaded after this heartbeat: that it is tried again is no success yet."""
    found: dict[_Key, str] = {}
    loaded = set()
    for one in status.versions:
        key = (one.model, one.version, one.artifact_digest)
        if one.state == LoadedVersion.STATE_READY:
            loaded.add(key)
        elif one.state == LoadedVersion.STATE_FAILED:
            found[key] = one.error
        elif key in before:
            found.setdefault(key, before[key])
    return {key: reason for key, reason in found.items() if key not in loaded}


@asynccontextmanager
async def workers_followed(bus: Bus, clock: Clock) -> AsyncIterator[Workers]:
    """Workers, heard of while the block runs."""
    workers = Workers(clock)
    async with bus.table(WORKERS, workers.apply) as table:
        workers.table = table
        async with running(_forgetting(workers, bus), "forget workers"):
            yield workers


async def _forgetting(workers: Workers, bus: Bus) -> None:
    """Delete from the topic who is gone, or it would hold everybody who ever was; any number of registries
    may. A worker cannot say it of itself: most that are gone were killed."""
    while True:
        await asyncio.sleep(_MINUTE_S)
        gone = workers.gone()
        if gone:
            try:
                await bus.publish([Record(WORKERS.name, worker_id.encode(), None) for worker_id in gone])
            except HeadraceError as error:
                log.info("workers_forgotten_later", reason=error.message)
            except Exception:
                log.exception("workers_not_forgotten")  # the next minute comes
            else:
                log.info("workers_forgotten", workers=gone[:20], count=len(gone))
