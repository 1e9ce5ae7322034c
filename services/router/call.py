"""One request on its way through the router: routed once, sent to an endpoint, answered exactly once.

States: new → sent or waiting, any number of times → done. `answer` of the owner is called on the way to done,
never after a cancel. There is no task and no future per request; the frame channel calls `_on_reply`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Code

from services.common.errors import HeadraceError, NotFound
from services.common.frames import lost
from services.router.assignment import unit_hash, unit_of
from services.router.endpoints import Endpoint, Group
from services.router.outliers import Verdict, verdict
from services.router.routing_table import Fallback, Route, Target
from services.router.shadow import Mirror
from services.router.span import RouteSpan

if TYPE_CHECKING:
    from services.router.dispatch import Dispatcher
    from services.router.result_cache import Flight

_OK: Final = Code.CODE_OK
_RETRYABLE: Final = frozenset({Code.CODE_UNAVAILABLE, Code.CODE_RESOURCE_EXHAUSTED})
#: Answers of versions that a shadow's are compared with.
_COMPARED: Final = frozenset({Code.CODE_OK, Code.CODE_INTERNAL})
#: What a worker answers without being to blame: the request is at fault, or its caller's patience.
_BLAMELESS: Final = frozenset(
    {Code.CODE_INVALID_ARGUMENT, Code.CODE_NOT_FOUND, Code.CODE_CANCELLED, Code.CODE_DEADLINE_EXCEEDED}
)

#: Whoever asked counts from its own receipt, so its patience ends a moment before our deadline.
_TIE_S: Final = 0.005

_monotonic = time.monotonic


class Owner(Protocol):
    """Whoever asked."""

    def answer(self, call: Call, reply: PredictReply) -> None:
        """Take the answer to `call`. The reply may be changed, and is not kept by anybody else."""
        ...


class Call:
    """One request and where it is."""

    __slots__ = (
        "_dispatcher",
        "_fallback",
        "_last_attempt",
        "_local_id",
        "_lost",
        "_retrying",
        "_span",
        "attempt",
        "began_at",
        "deadline",
        "done",
        "endpoint",
        "fell_back",
        "flight",
        "group",
        "mirrored",
        "owner",
        "owner_id",
        "request",
        "route",
        "sent_at",
        "target",
        "tried",
        "unit_hash",
    )

    def __init__(self, dispatcher: Dispatcher, request: PredictRequest, owner: Owner, now: float) -> None:
        """`now` is monotonic, the same for all requests of a frame."""
        self._dispatcher = dispatcher
        self.request = request
        self.owner = owner
        self.owner_id: int = request.id
        self.began_at = self.sent_at = now
        self.deadline = now
        self.route: Route | None = None
        self.target: Target | None = None
        self.unit_hash = 0
        self.endpoint: Endpoint | None = None
        self.group: Group
        self.tried: tuple[Endpoint, ...] = ()
        self.attempt = 0
        self.done = False
        #: Whether another version answers than was routed.
        self.fell_back = False
        #: Whether a shadow gets a copy once it is answered.
        self.mirrored = False
        #: Where it is with others that want the same of the result cache.
        self.flight: Flight | None = None
        self._fallback: Fallback | None = None
        self._last_attempt = dispatcher.max_attempts - 1
        self._retrying = False
        self._lost = False
        self._span: RouteSpan | None = None

    def begin(self) -> None:
        """Route the request and send it."""
        dispatcher, request = self._dispatcher, self.request
        dispatcher.budget.active += 1
        route = self.route = dispatcher.table.find(request.model)
        if route is None:
            self.refuse(dispatcher.unknown_model(request.model))
            return
        timeout_us = request.timeout_us
        self.deadline = self.began_at + (timeout_us / 1e6 if timeout_us else route.timeout_s)
        unit = unit_of(request.unit, request.request_id)
        self.unit_hash = hashed = unit_hash(unit)
        if request.version:
            try:
                target = route.named(request.version)
            except NotFound as error:
                self.refuse(error)
                return
            request.propensity = 1.0
        else:
            target = route.assign(unit)
            request.propensity = target.propensity
            fallback = route.fallback
            if fallback is not None and fallback.target is not target:
                self._fallback = fallback
            shadow = route.shadow
            if shadow is not None and shadow.target is not target and not request.origin:
                self.mirrored = Mirror.chosen(shadow, request)
        self.target = target
        request.version = target.version
        request.variant = target.variant
        request.unit_hash = hashed
        request.revision = route.revision
        if request.trace:
            self._span = RouteSpan.begin(dispatcher.tracing, self)
        if route.cache is not None and dispatcher.cache is not None:
            dispatcher.cache.enter(self, route.cache)
        else:
            self.send(self.began_at)

    def send(self, now: float) -> None:
        """Give the request to an endpoint that was not tried, or wait for one, or refuse."""
        route, target = self.route, self.target
        if route is None or target is None:
            raise RuntimeError("a call is sent before it was routed")
        dispatcher = self._dispatcher
        group = self.group = dispatcher.endpoints.group(target.key)
        if group.broken and self._spare_broken(group, now):
            return
        endpoint = group.pick(route.balancing, self.unit_hash, now, self.tried)
        if endpoint is None:
            self._find_none()
            return
        self.endpoint = endpoint
        self.sent_at = now
        endpoint.in_flight += 1
        self._local_id = endpoint.calls.submit(self.request, self.deadline, self._on_reply)

    def cancel(self) -> None:
        """Nobody waits any more; the worker is told."""
        if self.done:
            return
        endpoint = self.endpoint
        now = _monotonic()
        # Without a deadline of its own a request that was never routed cannot be late.
        late = self.route is not None and now >= self.deadline - _TIE_S
        if endpoint is not None:
            endpoint.in_flight -= 1
            endpoint.calls.cancel(self._local_id)
            if late:
                self._held_too_long(endpoint, now)
                self._judge(endpoint, PredictReply(code=Code.CODE_DEADLINE_EXCEEDED), now)
            elif self.group.outliers.breakers:
                self.group.judge(endpoint, Verdict.NOTHING, self.sent_at, self.sent_at)
        else:
            self._dispatcher.waiting.withdraw(self)
        if late:
            # The caller saw a timeout; a worker that drops what is cancelled logs nothing of it.
            self._dispatcher.log.note(self, Code.CODE_DEADLINE_EXCEEDED)
        self._end(Code.CODE_DEADLINE_EXCEEDED if late else Code.CODE_CANCELLED)
        if self.flight is not None and self._dispatcher.cache is not None:
            self._dispatcher.cache.leave(self)

    def answer_cached(self, reply: PredictReply) -> None:
        """Answer with what an equal request got; it is in the log already."""
        target = self.target
        if target is None:
            raise RuntimeError("a cached answer to a call that was not routed")
        reply.cached = True
        reply.version, reply.variant = target.version, target.variant
        self._finish(reply, ran=True)

    def give_up(self, error: HeadraceError) -> None:
        """No endpoint was there: the fallback answers, or `error` is the answer."""
        if self._fallback is None or not self._fall_back(error.code, "no_endpoint", _monotonic()):
            self.refuse(error)

    def refuse(self, error: HeadraceError) -> None:
        """Answer with `error`, without a worker."""
        target = self.target
        self._finish(
            PredictReply(
                code=error.code,
                message=error.message,
                field=error.field or "",
                version=target.version if target else "",
                variant=target.variant if target else "",
                retry_after_ms=error.retry_after_ms or 0,
            ),
            ran=False,
        )

    def resume(self) -> None:
        """An endpoint may be there now: it was waited for."""
        self.tried = ()
        self.send(_monotonic())

    # Inner steps

    def _find_none(self) -> None:
        """No endpoint can take it now: the fallback does, or it waits for one."""
        target = self.target
        if self._fallback is not None and self._fall_back(Code.CODE_UNAVAILABLE, "no_endpoint", _monotonic()):
            return
        if target is None or not self._dispatcher.waiting.add(self, target.key):
            self.refuse(self._dispatcher.no_endpoint(self))

    def _spare_broken(self, group: Group, now: float) -> bool:
        """Whether the fallback answers for a version whose every endpoint should be out; one request at a
        time is let through to find out when that ends."""
        fallback = self._fallback
        if fallback is None or group.outliers.due:
            return False
        if self._dispatcher.endpoints.group(fallback.target.key).broken:
            return False
        return self._fall_back(Code.CODE_UNAVAILABLE, "ejected", now)

    def _fall_back(self, code: Code, reason: str, now: float) -> bool:
        """Whether the request is on its way to the fallback version, once and for good.

        Its propensity stays: it says how the unit was assigned, not who answered in the end.
        """
        dispatcher, fallback, target = self._dispatcher, self._fallback, self.target
        if fallback is None or target is None or code not in fallback.on or now >= self.deadline:
            return False
        if not dispatcher.endpoints.group(fallback.target.key).members:
            return False
        self._fallback = None
        self.fell_back = True
        dispatcher.stats.fell_back(target.key, reason)
        request = self.request
        self.target = fallback.target
        request.version, request.variant = fallback.target.version, fallback.target.variant
        if self.tried:
            self.attempt += 1
            request.attempt = self.attempt
            self.tried = ()
        self._last_attempt = self.attempt + dispatcher.max_attempts - 1
        self.send(now)
        return True

    def _on_reply(self, reply: PredictReply) -> None:
        endpoint = self.endpoint
        if endpoint is None or self.done:
            return
        self.endpoint = None
        endpoint.in_flight -= 1
        now = _monotonic()
        code = reply.code
        self._judge(endpoint, reply, now)
        if code == _OK:
            endpoint.latency.observe(now - self.sent_at, now)
        elif code == Code.CODE_DEADLINE_EXCEEDED:
            self._held_too_long(endpoint, now)
        elif code not in _BLAMELESS:
            endpoint.latency.penalise(now)
            if code in _RETRYABLE and self._try_again(endpoint, reply, now):
                return
        if self._fallback is not None and code != _OK:
            self.tried = (*self.tried, endpoint)
            if self._fall_back(code, Code.Name(code).removeprefix("CODE_").lower(), now):
                return
        # What ran is in the worker's log, failures too: the worker says so by the time it took.
        self._finish(reply, ran=code == _OK or reply.compute_us > 0)

    def _held_too_long(self, endpoint: Endpoint, now: float) -> None:
        """An endpoint that keeps requests until they are late is at least as slow as that."""
        held = now - self.sent_at
        if held > endpoint.latency.value(now):
            endpoint.latency.observe(held, now)

    def _judge(self, endpoint: Endpoint, reply: PredictReply, now: float) -> None:
        """Tell the version's endpoints how this one did."""
        group, code = self.group, reply.code
        # A success where nothing is on record says nothing new, and that is nearly every request.
        if code == _OK and not group.outliers.breakers:
            return
        held = now - self.sent_at
        said = verdict(
            code,
            lost=code == Code.CODE_UNAVAILABLE and lost(reply),
            held_s=held,
            expected_s=endpoint.latency.value(now),
        )
        group.judge(endpoint, said, self.sent_at, now)

    def _try_again(self, endpoint: Endpoint, reply: PredictReply, now: float) -> bool:
        """Whether the request is on its way to another endpoint, or waits for one."""
        dispatcher, route, target = self._dispatcher, self.route, self.target
        if route is None or target is None:
            return False
        self.tried = (*self.tried, endpoint)
        if self.attempt >= self._last_attempt or now >= self.deadline:
            return False
        gone = lost(reply)
        if gone and self._lost:
            # Two endpoints died holding it. Perhaps it is what kills them.
            return False
        self._lost = self._lost or gone
        others = any(member not in self.tried for member in dispatcher.endpoints.group(target.key).members)
        if not others and not (gone and dispatcher.endpoints.coming(target.key)):
            return False
        if not gone and not self._retrying:
            if not dispatcher.budget.take():
                return False
            self._retrying = True
        self.attempt += 1
        self.request.attempt = self.attempt
        dispatcher.stats.retried(target.key, "lost" if gone else "refused")
        self.send(now)
        return True

    def _finish(self, reply: PredictReply, *, ran: bool) -> None:
        """Answer. `ran` says that a worker has logged it."""
        code = reply.code
        if code != _OK:
            self._explain(reply)
        if not ran:
            self._dispatcher.log.note(self, code)
        self._end(code)
        if self.flight is not None and self._dispatcher.cache is not None:
            self._dispatcher.cache.settle(self, reply)
        if self.fell_back:
            reply.fallback = True
        reply.id = self.owner_id
        self.owner.answer(self, reply)
        if self.mirrored and code in _COMPARED and not (self.fell_back or reply.cached):
            self._mirror(reply)

    def _mirror(self, reply: PredictReply) -> None:
        """Leave request and reply to the mirror; nobody changes them any more."""
        mirror, route, target = self._dispatcher.mirror, self.route, self.target
        if mirror is not None and route is not None and target is not None:
            mirror.offer(self.request, route, target, reply, _monotonic() - self.sent_at)

    def _explain(self, reply: PredictReply) -> None:
        """Complete a reply that no worker made: its words are about our connection, not the caller's."""
        if lost(reply):
            reply.message = "the worker was lost before it answered"
            reply.retry_after_ms = reply.retry_after_ms or 1000
        if self.target is not None and not reply.version:
            reply.version = self.target.version
            reply.variant = self.target.variant

    def _end(self, code: Code) -> None:
        dispatcher = self._dispatcher
        self.done = True
        dispatcher.budget.active -= 1
        if self._retrying:
            dispatcher.budget.give_back()
        dispatcher.stats.answered(
            self.target.key if self.target is not None else None, code, _monotonic() - self.began_at
        )
        if self._span is not None:
            self._span.end(self, code)
