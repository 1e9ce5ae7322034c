"""What is known of one request and what the router decided about it: the part of a call that never waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.assignment import unit_digest
from services.common.frames.detached import Buffer
from services.common.shared_memory import in_shared_memory
from services.router.group import Endpoint, Group
from services.router.routing_table import Fallback, Route, Target
from services.router.shadow import Mirror
from services.router.span import RouteSpan

if TYPE_CHECKING:
    from services.router.call import Call
    from services.router.dispatch import Dispatcher, Way
    from services.router.result_cache import Flight

#: What precedes fields that are appended to a request: unit_hash (16, fixed64), attempt (18, varint) and
#: trace (9, 25 bytes). In protobuf the last value of a field counts.
_UNIT_HASH: Final = b"\x81\x01"
_ATTEMPT: Final = b"\x90\x01"
_TRACE: Final = b"\x4a\x19"

#: What is larger is better read, joined and logged by a process that has nothing else to do ...
_SMALL_BYTES: Final = 16 << 10
#: ... but for few rows of up to so many bytes, for which that process takes longer to come by than to run.
_FEW_ROWS: Final = 8
_BULKY_BYTES: Final = 1 << 20


class Owner(Protocol):
    """Whoever asked."""

    def answer(self, call: Call, reply: PredictReply) -> None:
        """Take the answer to `call`. The reply may be changed, and is not kept by anybody else."""
        ...

    def pass_on(self, call: Call, reply: bytes) -> None:
        """The same for an answer that nobody needs to change, as the worker sent it, but for its id."""
        ...


class Routed:
    """A request with its route. Subclasses send it."""

    # What few requests have stands here once, so that the others need not say that they have it not.

    #: What stands before `payload`: large tensors, where they arrived.
    apart: tuple[Buffer, ...] = ()
    #: None until there is a deployment for the model.
    route: Route | None = None
    target: Target | None = None
    #: To `target`, since it was sent there.
    way: Way | None = None
    endpoint: Endpoint | None = None
    deadline = 0.0
    unit_hash = 0
    #: Of the version that was assigned, whoever answers in the end.
    propensity = 1.0
    tried: tuple[Endpoint, ...] = ()
    attempt = 0
    done = False
    #: Whether a success goes back as it is, and nobody else wants to know.
    plain = True
    #: Whether another version answers than was routed.
    fell_back = False
    #: Whether a shadow gets a copy once it is answered.
    mirrored = False
    #: Where it is with others that want the same of the result cache.
    flight: Flight | None = None
    _fallback: Fallback | None = None
    #: The first one of the version that is asked.
    _first_attempt = 0
    _retrying = False
    _lost = False
    _span: RouteSpan | None = None

    group: Group
    _local_id: int

    def __init__(
        self, dispatcher: Dispatcher, request: PredictRequest, payload: Buffer, owner: Owner, now: float
    ) -> None:
        """`payload` is `request` serialized, but for what is `apart`; the request may itself be without the
        data of large tensors. `now` is monotonic, the same for all requests of a frame."""
        self._dispatcher = dispatcher
        self.request = request
        self.payload = payload
        #: What is appended to `payload`.
        self.stamp = b""
        self.owner = owner
        self.owner_id: int = request.id
        self.began_at = self.sent_at = now

    @property
    def small(self) -> bool:
        """Whether a worker in this process may as well answer it. What lies in shared memory is large,
        whatever it says: that is why it was put there."""
        if (self.apart or len(self.payload) > _SMALL_BYTES) and not self._few_rows:
            return False
        return not (self._dispatcher.shared_memory and in_shared_memory(self.request))

    @property
    def _few_rows(self) -> bool:
        """Whether it has few rows, by its first input, and is not too large for this process even so."""
        size = len(self.payload)
        for part in self.apart:
            size += len(part)
        if size > _BULKY_BYTES or not self.request.inputs:
            return False
        shape = self.request.inputs[0].shape
        return len(shape) > 1 and shape[0] <= _FEW_ROWS

    def decide(self) -> Route:
        """Choose the version, and state it in `stamp`. Raises NotFound or Unavailable."""
        dispatcher, request, now = self._dispatcher, self.request, self.began_at
        route = self.route = dispatcher.find(request.model)
        if route is None:
            raise dispatcher.unknown_model(request.model)
        unit = request.unit.encode() or request.request_id
        digest = b""
        timeout_us = request.timeout_us
        self.deadline = now + (timeout_us * 1e-6 if timeout_us else route.timeout_s)
        if request.version:
            target = route.named(request.version)
            stamp = target.stamp_named
        else:
            assigned = None if route.experiments is None else route.experiments.assign(request)
            if assigned is None:
                target = route.assign(unit)
            else:
                target = route.arm(assigned)
                digest = assigned.digest
            self.propensity = target.propensity
            stamp = target.stamp
            if route.watched:
                self._watch(route, target)
        self.target = target
        digest = digest or unit_digest(unit)
        self.unit_hash = int.from_bytes(digest, "little")
        stamp += _UNIT_HASH + digest
        self.stamp = stamp if timeout_us else stamp + route.timeout
        if request.trace:
            self._trace()
        return route

    def _watch(self, route: Route, target: Target) -> None:
        """Note who else has to do with requests that were assigned."""
        shadow = route.shadow
        if target.fallback is not None:
            self._fallback = target.fallback
        if shadow is not None and shadow.target.key != target.key and not self.request.origin:
            self.mirrored = Mirror.chosen(shadow, self.request)
            if self.mirrored:
                self.plain = False

    def _trace(self) -> None:
        self._span = RouteSpan.begin(self._dispatcher.tracing, self)
        if self._span is not None:
            self.plain = False
            self.stamp += _TRACE + self._span.context

    def _send_as(self, attempt: int) -> None:
        """The worker and its log learn how many were asked before."""
        self.attempt = attempt
        self.stamp += _ATTEMPT + bytes((attempt,))
