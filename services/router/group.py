"""The endpoints that can answer one version, and which of them gets a request.

An endpoint is a worker as requests see it. One in the router's own process is nearer than the others: it is
for small requests, where the deployment leaves it to the router who answers first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Final, Protocol

import structlog
from headrace.v1.control_pb2 import Balancing, LoadedVersion, WorkerStatus
from headrace.v1.dataplane_pb2 import PredictRequest

from services.common.frames.address import Address
from services.common.frames.detached import Buffer
from services.router.balancing import PeakEwma, Picker, picker
from services.router.outliers import OutlierPolicy, Outliers, Verdict
from services.router.routing_table import VersionKey

log = structlog.get_logger(__name__)

_GONE: Final = frozenset({WorkerStatus.STATE_DRAINING, WorkerStatus.STATE_GONE})
#: Where the router may prefer whom it reaches soonest.
_BY_LATENCY: Final = frozenset({Balancing.BALANCING_UNSPECIFIED, Balancing.BALANCING_LEAST_LATENCY})

#: Takes a PredictReply, and the same serialized, or None where the connection made it.
OnReply = Callable[..., None]


class Calls(Protocol):
    """The part of FrameCalls that the router uses."""

    @property
    def usable(self) -> bool:
        """Connected and not draining."""
        ...

    def start(self) -> None:
        """Connect, and stay connected."""
        ...

    def submit(self, request: PredictRequest, deadline: float | None, on_reply: OnReply) -> int:
        """Send; exactly one reply follows."""
        ...

    def forward(
        self,
        request: Buffer,
        more: bytes,
        deadline: float,
        on_reply: OnReply,
        tensors: tuple[Buffer, ...] = (),
    ) -> int:
        """Send a serialized request, what stands before it, and `more` fields, of which the last value
        counts."""
        ...

    def cancel(self, local_id: int) -> None:
        """No reply is wanted any more."""
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...


class Endpoint:
    """One worker as requests see it."""

    __slots__ = (
        "address",
        "busy_since",
        "calls",
        "expires_at",
        "in_flight",
        "incarnation",
        "latency",
        "leaving",
        "near",
        "sequence",
        "versions",
        "worker_id",
    )

    def __init__(self, status: WorkerStatus) -> None:
        self.worker_id: str = status.worker_id
        self.address: str = status.frames_address
        #: Whether it is in this process.
        self.near = bool(Address.parse(self.address).name)
        self.calls: Calls
        self.in_flight = 0
        self.busy_since = 0.0
        self.latency = PeakEwma()
        self.incarnation: str = status.incarnation
        self.sequence: int = status.sequence
        self.leaving = status.state in _GONE
        self.expires_at = 0.0
        self.versions: dict[VersionKey, LoadedVersion.State] = _versions(status)

    def update(self, status: WorkerStatus) -> None:
        """Take a newer status of the same worker at the same address."""
        if status.incarnation != self.incarnation:
            self.incarnation = status.incarnation
            self.latency = PeakEwma()
        self.sequence = status.sequence
        self.leaving = status.state in _GONE
        self.versions = _versions(status)

    def take(self, now: float) -> None:
        """One more request is sent to it."""
        if not self.in_flight:
            # Where others were given up and none was answered since, this one tries it out.
            self.busy_since = self.latency.unanswered_since or now
        self.in_flight += 1

    @property
    def reachable(self) -> bool:
        """Whether it takes requests at all."""
        return self.calls.usable and not self.leaving


class Group:
    """The endpoints that can answer one version."""

    __slots__ = ("_balancing", "_far", "_near", "_picker", "_rng", "broken", "members", "outliers", "ready")

    def __init__(self, rng: random.Random, policy: OutlierPolicy) -> None:
        #: All that could answer, and those of them that are offered: the others are ejected.
        self.ready: tuple[Endpoint, ...] = ()
        self.members: tuple[Endpoint, ...] = ()
        #: Of these, who are in this process, and all others.
        self._near: tuple[Endpoint, ...] = ()
        self._far: tuple[Endpoint, ...] = ()
        #: Whether every one of them should be out: they serve, since there is no other.
        self.broken = False
        self.outliers: Outliers[Endpoint] = Outliers(policy)
        self._rng = rng
        self._balancing = Balancing.BALANCING_UNSPECIFIED
        self._picker: Picker = picker(self._balancing, rng)

    def fill(self, ready: tuple[Endpoint, ...]) -> None:
        """These could answer now."""
        self.ready = ready
        members, self.broken = self.outliers.offered(ready)
        self.members = members
        self._near = tuple(member for member in members if member.near)
        self._far = tuple(member for member in members if not member.near)

    def pick(
        self,
        balancing: Balancing,
        unit_hash: int,
        now: float,
        tried: tuple[Endpoint, ...] = (),
        *,
        small: bool = False,
    ) -> Endpoint | None:
        """One that was not tried yet; None where there is none. Every pick must be followed by a `judge`, as
        it may be the one request that tries an endpoint out.

        A `small` request goes to a worker in this process, if there is one and the deployment leaves it to
        the router who answers first; all others go to the worker processes, as long as there are any."""
        if self.outliers.due:
            probed = self.outliers.probe(self.ready, tried)
            if probed is not None:
                return probed
        members = self.members
        if self._near:
            if small and balancing in _BY_LATENCY and not tried:
                return self._near[0]
            members = self._far or members
        if tried:
            members = tuple(member for member in members if member not in tried)
            if not members and self._near:
                members = tuple(member for member in self.members if member not in tried)
        if not members:
            return None
        if balancing != self._balancing:
            self._balancing = balancing
            self._picker = picker(balancing, self._rng)
        return self._picker.pick(members, unit_hash, now)

    def judge(
        self, endpoint: Endpoint, said: Verdict, sent_at: float, now: float, usual_s: float = math.inf
    ) -> None:
        """Take what a reply says about `endpoint`, where an answer usually takes `usual_s` seconds."""
        before = self.outliers.ejected_total
        if self.outliers.judge(endpoint, said, len(self.ready), sent_at, now, usual_s):
            self.fill(self.ready)
        if self.outliers.ejected_total > before:
            log.warning(
                "endpoint_ejected",
                worker=endpoint.worker_id,
                seconds=round(self.outliers.breakers[endpoint].until - now),
                last=self.broken,
            )


def _versions(status: WorkerStatus) -> dict[VersionKey, LoadedVersion.State]:
    return {(loaded.model, loaded.version): loaded.state for loaded in status.versions}
