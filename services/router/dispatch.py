"""Takes frames from gateways and hands every item to a worker. Each item costs one `Call` and no task."""

from __future__ import annotations

import time
from typing import NamedTuple

import structlog
from headrace.v1.dataplane_pb2 import PredictReply, RequestFrame

from services.common.errors import HeadraceError, Internal, NotFound, Unavailable
from services.common.frames import Peer
from services.common.telemetry import Tracing
from services.router.call import Call
from services.router.endpoints import Endpoints
from services.router.group import Group
from services.router.hedging import Hedges
from services.router.prediction_log import RefusalLog
from services.router.result_cache import ResultCache
from services.router.retry_budget import RetryBudget
from services.router.routing_table import RoutingTable, Target, VersionKey
from services.router.shadow import Mirror
from services.router.stats import Stats, VersionStats
from services.router.waiting import Waiting

log = structlog.get_logger(__name__)

_monotonic = time.monotonic


class Way(NamedTuple):
    """What every request for one version has to do with."""

    group: Group
    totals: VersionStats
    hedges: Hedges


class Dispatcher:
    """What all calls share."""

    def __init__(  # noqa: PLR0913 - the parts of a router, wired once
        self,
        table: RoutingTable,
        endpoints: Endpoints,
        refusals: RefusalLog,
        stats: Stats,
        tracing: Tracing,
        budget: RetryBudget,
        *,
        max_attempts: int,
        endpoint_wait_s: float,
        max_waiting: int,
        cache: ResultCache | None = None,
        mirror: Mirror | None = None,
        shared_memory: bool = False,
    ) -> None:
        self.table = table
        self.find = table.find
        self.endpoints = endpoints
        self.log = refusals
        self.stats = stats
        self.tracing = tracing
        self.budget = budget
        self.max_attempts = max_attempts
        self.cache = cache
        self.mirror = mirror
        #: Whether inputs may lie there.
        self.shared_memory = shared_memory
        #: By target, for as long as its route stays.
        self.ways: dict[Target, Way] = {}
        self._hedges: dict[VersionKey, Hedges] = {}
        self.waiting = Waiting(self, endpoints, wait_s=endpoint_wait_s, limit=max_waiting)

    def way(self, target: Target) -> Way:
        """The way to `target`."""
        way = self.ways.get(target)
        if way is None:
            key = target.key
            hedges = self._hedges.setdefault(key, Hedges())
            way = self.ways[target] = Way(self.endpoints.group(key), self.stats.of(key), hedges)
        return way

    def table_changed(self) -> None:
        """Some routes, and so their targets, are others now."""
        self.ways.clear()
        served = {target.key for route in self.table for target in route.targets}
        for key in self._hedges.keys() - served:
            self._hedges.pop(key).close()
        self.waiting.forget_all_but(served)
        self.endpoints.forget_all_but(served)
        self.stats.forget_all_but(served.union([key for key, _ in self.endpoints.groups()]))

    def close(self) -> None:
        """Nothing is sent a second time any more."""
        for hedges in self._hedges.values():
            hedges.close()

    def unknown_model(self, model: str) -> HeadraceError:
        """Why there is no route."""
        if not self.table.known:
            return Unavailable("the routing table is not known yet", retry_after_ms=1000)
        return NotFound(f"model {model!r} is not deployed", field="model")

    def no_endpoint(self, call: Call) -> HeadraceError:
        """Why nobody answers."""
        version = call.target.version if call.target is not None else call.request.version
        why = self.endpoints.hindrance((call.request.model, version))
        said = f"no worker is ready for {call.request.model} version {version}"
        return Unavailable(f"{said}: {why}" if why else said, retry_after_ms=1000)


class GatewayConnection:
    """One gateway's stream."""

    def __init__(self, dispatcher: Dispatcher, peer: Peer) -> None:
        self._dispatcher = dispatcher
        self._peer = peer
        self._calls: dict[int, Call] = {}

    def on_request_frame(self, frame: RequestFrame) -> None:
        """Send every item on, in the same turn of the loop."""
        calls = self._calls
        for identifier in frame.cancels:
            cancelled = calls.pop(identifier, None)
            if cancelled is not None:
                cancelled.cancel()
        now = _monotonic()
        dispatcher = self._dispatcher
        apart = self._peer.apart
        for item, payload in zip(frame.items[:], self._peer.item_payloads(), strict=False):
            call = calls[item.id] = Call(dispatcher, item, payload, self, now)
            if apart:
                call.apart = apart
            try:
                call.begin()
            except Exception:
                log.exception("routing_failed", model=item.model)
                if not call.done:
                    call.refuse(Internal("the request could not be routed"))

    def answer(self, call: Call, reply: PredictReply) -> None:
        """Part of Owner: reply to the gateway; what a loop turn brings leaves in one frame."""
        self._calls.pop(call.owner_id, None)
        self._peer.reply(reply)

    def pass_on(self, call: Call, reply: bytes) -> None:
        """Part of Owner."""
        self._calls.pop(call.owner_id, None)
        self._peer.forward(call.owner_id, reply)

    def on_closed(self) -> None:
        """The gateway has gone: nobody waits for its requests any more."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.cancel()
