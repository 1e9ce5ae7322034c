"""The workers: who they are (control.workers.v1), whether they can be reached (their frame connection), what
they have loaded.

An endpoint takes requests for a version while its worker says that the version is ready, is neither draining
nor gone, and its connection stands. Heartbeats bring workers in and tell what they hold; the connection alone
takes them out at once, and keeps them in while Kafka is away.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Container, Iterable
from typing import Final

import structlog
from headrace.v1.control_pb2 import LoadedVersion, WorkerStatus

from services.common.clock import Clock
from services.router.balancing import PeakEwma
from services.router.group import Calls, Endpoint, Group
from services.router.outliers import OutlierPolicy
from services.router.routing_table import VersionKey

log = structlog.get_logger(__name__)

_COMING: Final = frozenset({LoadedVersion.STATE_LOADING, LoadedVersion.STATE_WARMING})
#: A status older than this is of a worker that left without a word long ago, seconds.
_FORGOTTEN_S: Final = 3600.0
_SWEEP_S: Final = 0.5

#: Makes the calls to an address; the callback hears every change of `usable`.
Connect = Callable[[str, Callable[[bool], None]], Calls]


class Endpoints:
    """Every worker known, and for every version those that can answer it."""

    def __init__(
        self,
        connect: Connect,
        clock: Clock,
        *,
        expiry_s: float,
        outliers: OutlierPolicy = OutlierPolicy(),  # noqa: B008 - frozen
        on_change: Callable[[], None] = lambda: None,
        seed: int | None = None,
    ) -> None:
        """`on_change` is called when a version gained an endpoint or a worker came, went or changed what it
        has, not for a heartbeat that says nothing new."""
        self._connect = connect
        self._clock = clock
        self._expiry_s = expiry_s
        self._outliers = outliers
        self._on_change = on_change
        self._rng = random.Random(seed)
        self._endpoints: dict[str, Endpoint] = {}
        self._groups: dict[VersionKey, Group] = {}
        self._raw: dict[str, bytes] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def group(self, key: VersionKey) -> Group:
        """The endpoints of one version; the same object for as long as the version is served, or a worker has
        it."""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(self._rng, self._outliers)
            self._fill([key])
        return group

    def forget_all_but(self, served: Container[VersionKey]) -> None:
        """Nothing else is routed to any more. What a worker still has may have requests under way: it stays
        for now."""
        for key in [key for key, group in self._groups.items() if key not in served and not group.ready]:
            del self._groups[key]

    def coming(self, key: VersionKey) -> bool:
        """Whether a worker may soon answer the version: it is loading it, or has it and is being reached."""
        return any(
            not endpoint.leaving
            and (
                endpoint.versions.get(key) in _COMING
                or (endpoint.versions.get(key) == LoadedVersion.STATE_READY and not endpoint.calls.usable)
            )
            for endpoint in self._endpoints.values()
        )

    def hindrance(self, key: VersionKey) -> str:
        """Why nobody answers the version, as far as workers say: empty where they say nothing of it."""
        states = {one.versions.get(key) for one in self._endpoints.values() if not one.leaving}
        if states & _COMING:
            return "it is still being loaded"
        if LoadedVersion.STATE_FAILED in states:
            return "it cannot be loaded, and POST /v2/repository/index says why"
        return ""

    def groups(self) -> list[tuple[VersionKey, Group]]:
        """The endpoints of every version that was asked for."""
        return list(self._groups.items())

    def all(self) -> list[Endpoint]:
        """Every worker known, reachable or not."""
        return list(self._endpoints.values())

    def now(self) -> float:
        """The monotonic moment, for reading latencies."""
        return self._clock.monotonic()

    def records(self) -> dict[str, bytes]:
        """The last status of every worker, serialized, for the snapshot."""
        return dict(self._raw)

    # What workers say.

    def apply(self, key: bytes, value: bytes | None) -> None:
        """Take one record of control.workers.v1; an older one than is known is ignored."""
        worker_id = key.decode()
        if value is None:
            self._remove(worker_id, "removed")
            return
        status = WorkerStatus.FromString(value)
        if status.worker_id != worker_id:
            raise ValueError(f"the record of {worker_id!r} is about {status.worker_id!r}")
        known = self._endpoints.get(worker_id)
        if (
            known is not None
            and status.incarnation == known.incarnation
            and status.sequence <= known.sequence
        ):
            return
        if status.state == WorkerStatus.STATE_GONE:
            self._remove(worker_id, "gone")
        elif known is not None and known.address == status.frames_address:
            self._renew(known, status, value)
        elif self._clock.unix_us() - status.sent_at_us < _FORGOTTEN_S * 1e6:
            self._remove(worker_id, "moved")
            self._add(status, value)

    def restore(self, key: bytes, value: bytes | None) -> None:
        """Take one record of the snapshot, however old: whether the worker is there, its connection tells."""
        if value is not None and key.decode() not in self._endpoints:
            self._add(WorkerStatus.FromString(value), value)

    def _add(self, status: WorkerStatus, value: bytes) -> None:
        endpoint = Endpoint(status)
        endpoint.calls = self._connect(
            endpoint.address, lambda usable: self._on_connection(endpoint, usable=usable)
        )
        endpoint.expires_at = self._expiry(status)
        self._endpoints[endpoint.worker_id] = endpoint
        self._keep(endpoint, value)
        endpoint.calls.start()
        log.info("worker_found", worker=endpoint.worker_id, address=endpoint.address)
        self._changed(endpoint.versions)

    def _renew(self, endpoint: Endpoint, status: WorkerStatus, value: bytes) -> None:
        before = (endpoint.versions, endpoint.leaving, endpoint.incarnation)
        endpoint.update(status)
        if endpoint.incarnation != before[2]:
            self._forget(endpoint)
        endpoint.expires_at = self._expiry(status)
        if before != (endpoint.versions, endpoint.leaving, endpoint.incarnation):
            self._keep(endpoint, value)
            keys = {**before[0], **endpoint.versions}
            if before[1:] == (endpoint.leaving, endpoint.incarnation):
                # A worker that starts says so for each of its versions, which may be thousands.
                now, then = endpoint.versions, before[0]
                self._changed([key for key in keys if now.get(key) != then.get(key)])
            else:
                self._changed(keys)

    def _keep(self, endpoint: Endpoint, value: bytes) -> None:
        if not endpoint.near:  # it does not outlive this process
            self._raw[endpoint.worker_id] = value

    def _expiry(self, status: WorkerStatus) -> float:
        return self._clock.monotonic() + max(3 * status.interval_ms / 1e3, self._expiry_s)

    def _remove(self, worker_id: str, reason: str) -> None:
        endpoint = self._endpoints.pop(worker_id, None)
        if endpoint is None:
            return
        endpoint.leaving = True
        self._raw.pop(worker_id, None)
        self._forget(endpoint)
        log.info("worker_left", worker=worker_id, reason=reason)
        self._changed(endpoint.versions)
        task = asyncio.get_running_loop().create_task(endpoint.calls.close(), name=f"close {worker_id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _forget(self, endpoint: Endpoint) -> None:
        for group in self._groups.values():
            group.outliers.forget(endpoint)

    # What connections say.

    def _on_connection(self, endpoint: Endpoint, *, usable: bool) -> None:
        log.info("worker_connection", worker=endpoint.worker_id, usable=usable)
        if usable:
            # What was lost with the last connection says nothing about this one.
            endpoint.latency = PeakEwma()
        self._changed(endpoint.versions)

    def _changed(self, keys: Iterable[VersionKey]) -> None:
        self._fill(keys)
        self._on_change()

    def _fill(self, keys: Iterable[VersionKey]) -> None:
        for key in keys:
            group = self._groups.get(key)
            if group is not None:
                # Who is in this process and has it does not take everything, and so stands for nobody else.
                near = self._having(key, LoadedVersion.STATE_READY, near=True)
                far = self._able(key, near=False)
                group.fill(far + near or self._able(key, near=True))

    def _able(self, key: VersionKey, *, near: bool) -> tuple[Endpoint, ...]:
        """Those who have it; where nobody has it in memory, whoever loads it on demand; and a version that
        was taken away and is wanted again is answered by those who are not rid of it yet."""
        return (
            self._having(key, LoadedVersion.STATE_READY, near=near)
            or self._having(key, LoadedVersion.STATE_EVICTED, near=near)
            or self._having(key, LoadedVersion.STATE_UNLOADING, near=near)
        )

    def _having(self, key: VersionKey, state: LoadedVersion.State, *, near: bool) -> tuple[Endpoint, ...]:
        return tuple(
            endpoint
            for endpoint in self._endpoints.values()
            if endpoint.near is near and endpoint.reachable and endpoint.versions.get(key) == state
        )

    # Time

    async def expire(self) -> None:
        """Forget workers that neither beat nor can be reached, end ejections; runs until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """Forget those that are past their time now, let those back whose ejection is over."""
        now = self._clock.monotonic()
        for group in self._groups.values():
            if group.outliers.breakers:
                group.outliers.sweep(now)
        for endpoint in self.all():
            if endpoint.expires_at < now and not endpoint.calls.usable:
                self._remove(endpoint.worker_id, "silent")

    async def close(self) -> None:
        """Disconnect from every worker."""
        for worker_id in list(self._endpoints):
            self._remove(worker_id, "closing")
        if self._closing:
            await asyncio.wait(set(self._closing))
