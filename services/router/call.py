"""One request on its way through the router: routed once, sent to an endpoint, answered exactly once.

States: new → sent or waiting, any number of times → done. `answer` of the owner is called on the way to done,
never after a cancel. There is no task and no future per request; the frame channel calls `_on_reply`.
"""

from __future__ import annotations

import time
from typing import Final

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Code

from services.common.errors import HeadraceError
from services.common.frames import lost, timeout_override
from services.router.group import Endpoint, Group
from services.router.hedging import Attempt
from services.router.outliers import Verdict, verdict
from services.router.routed import Routed
from services.router.stats import NOWHERE

_OK: Final = Code.CODE_OK
_CODES: Final = frozenset(Code.values())
_RETRYABLE: Final = frozenset({Code.CODE_UNAVAILABLE, Code.CODE_RESOURCE_EXHAUSTED})
#: Answers of versions that a shadow's are compared with.
_COMPARED: Final = frozenset({Code.CODE_OK, Code.CODE_INTERNAL})
#: What a worker answers without being to blame: the request is at fault, or its caller's patience (of which
#: another endpoint may need less).
_AT_FAULT: Final = frozenset({Code.CODE_INVALID_ARGUMENT, Code.CODE_NOT_FOUND, Code.CODE_CANCELLED})
_BLAMELESS: Final = _AT_FAULT | {Code.CODE_DEADLINE_EXCEEDED}

#: Whoever asked counts from its own receipt, so its patience ends a moment before our deadline.
_TIE_S: Final = 0.005

_monotonic = time.monotonic


class Call(Routed):
    """One request and where it is. It is sent as it came, with what the router decided appended."""

    _hedge: Attempt | None = None
    #: Since when it may become late; 0: its deployment does not hedge.
    watched_at = 0.0

    def begin(self) -> None:
        """Route the request and send it."""
        dispatcher = self._dispatcher
        dispatcher.budget.active += 1
        try:
            route = self.decide()
        except HeadraceError as error:
            self.refuse(error)
            return
        if route.cache is not None and dispatcher.cache is not None:
            self.plain = False
            if self.apart or isinstance(self.payload, memoryview):  # what is cached, and logged, is all of it
                self.request = PredictRequest.FromString(b"".join((*self.apart, self.payload)))
            dispatcher.cache.enter(self, route.cache)
        else:
            self.send(self.began_at)

    def send(self, now: float) -> None:
        """Give the request to an endpoint that was not tried, or wait for one, or refuse."""
        route, target = self.route, self.target
        if route is None or target is None:
            raise RuntimeError("a call is sent before it was routed")
        way = self.way = self._dispatcher.way(target)
        group = self.group = way.group
        if group.broken and self._spare_broken(group, now):
            return
        endpoint = group.pick(route.balancing, self.unit_hash, now, self.tried, small=self.small)
        if endpoint is None:
            self._find_none()
            return
        self.endpoint = endpoint
        self.sent_at = now
        endpoint.take(now)
        stamp = self.stamp
        if now != self.began_at:
            stamp += timeout_override(int((self.deadline - now) * 1e6))
        self._local_id = endpoint.calls.forward(
            self.payload, stamp, self.deadline, self._on_reply, self.apart
        )
        if route.hedging is not None and not self.attempt:
            self.plain = False
            self.watched_at = now
            way.hedges.watch(self, route.hedging, now)

    def hedge(self, now: float) -> None:
        """It is late: ask a second endpoint as well, if there is one and the budget allows it."""
        route, target, first = self.route, self.target, self.endpoint
        if self.done or first is None or route is None or target is None or self._hedge is not None:
            return
        others = any(member is not first and member not in self.tried for member in self.group.members)
        if not others or self.group.broken or now >= self.deadline:
            return
        if not (self._retrying or self._dispatcher.budget.take()):
            return
        self._retrying = True
        endpoint = self.group.pick(route.balancing, self.unit_hash, now, (*self.tried, first))
        if endpoint is None:
            return
        self._send_as(self.attempt + 1)
        hedge = self._hedge = Attempt(endpoint, now)
        endpoint.take(now)
        self._dispatcher.stats.hedged(target.key, "sent")
        stamp = self.stamp + timeout_override(int((self.deadline - now) * 1e6))
        hedge.local_id = endpoint.calls.forward(
            self.payload, stamp, self.deadline, self._on_hedge_reply, self.apart
        )

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
                self._judge(endpoint, PredictReply(code=Code.CODE_DEADLINE_EXCEEDED), self.sent_at, now)
                endpoint.latency.late(now - self.sent_at, now)
            elif self.group.outliers.breakers:
                self.group.judge(endpoint, Verdict.NOTHING, self.sent_at, self.sent_at)
        else:
            self._dispatcher.waiting.withdraw(self)
        if late:
            # The caller saw a timeout; a worker that drops what is cancelled logs nothing of it.
            self._dispatcher.log.note(self, Code.CODE_DEADLINE_EXCEEDED)
        self._end(Code.CODE_DEADLINE_EXCEEDED if late else Code.CODE_CANCELLED, now)
        if self.flight is not None and self._dispatcher.cache is not None:
            self._dispatcher.cache.leave(self)

    def answer_cached(self, reply: PredictReply) -> None:
        """Answer with what an equal request got; it is in the log already."""
        target = self.target
        if target is None:
            raise RuntimeError("a cached answer to a call that was not routed")
        reply.cached = True
        reply.version, reply.variant, reply.experiment = target.version, target.variant, target.experiment
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
                experiment=target.experiment if target else "",
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
        if self._hedge is not None:
            self._drop_hedge(self._hedge, now)  # one version at a time
        self._fallback = None
        self.fell_back = True
        dispatcher.stats.fell_back(target.key, reason)
        self.plain = False
        self.target = fallback.target
        self.stamp += fallback.target.name
        if self.tried:
            self._send_as(self.attempt + 1)
            self.tried = ()
        self._first_attempt = self.attempt
        self.send(now)
        return True

    def _on_reply(self, reply: PredictReply, payload: bytes | None) -> None:
        """`payload` is `reply` serialized; None where the connection made it."""
        endpoint = self.endpoint
        if endpoint is None or self.done:
            return
        self.endpoint = None
        endpoint.in_flight -= 1
        now = _monotonic()
        if reply.code:
            self._on_failure(endpoint, reply, now)
            return
        # A success where nothing is on record says nothing new, and that is nearly every request.
        if self.group.outliers.breakers:
            self._judge(endpoint, reply, self.sent_at, now)
        endpoint.latency.observe(now - self.sent_at, now)
        if self.plain and payload is not None:
            self._end(_OK, now)
            self.owner.pass_on(self, payload)
            return
        if self.way is not None and self.watched_at and not self.fell_back:
            self.way.hedges.usual.observe(now - self.watched_at)
        self._finish(reply, ran=True)

    def _on_hedge_reply(self, reply: PredictReply, payload: bytes | None) -> None:
        hedge = self._hedge
        if self.done or hedge is None or hedge.endpoint is None:
            return
        if reply.code and self.endpoint is not None:
            self._lose(hedge, hedge.endpoint, reply)
            return
        if not reply.code and self.target is not None:
            self._dispatcher.stats.hedged(self.target.key, "won")
        # From here on it is the one that was asked first.
        hedge.endpoint, self.endpoint = self.endpoint, hedge.endpoint
        hedge.sent_at, self.sent_at = self.sent_at, hedge.sent_at
        hedge.local_id, self._local_id = self._local_id, hedge.local_id
        self._on_reply(reply, payload)

    def _lose(self, hedge: Attempt, endpoint: Endpoint, reply: PredictReply) -> None:
        """The second endpoint failed: the first one decides."""
        now = _monotonic()
        hedge.endpoint = None
        endpoint.in_flight -= 1
        self.tried = (*self.tried, endpoint)
        self._judge(endpoint, reply, hedge.sent_at, now)
        if reply.code not in _BLAMELESS:
            endpoint.latency.penalise(now)

    def _drop_hedge(self, hedge: Attempt, now: float) -> None:
        """The loser is cancelled, and has shown how slow it is at least."""
        endpoint, hedge.endpoint = hedge.endpoint, None
        if endpoint is None:
            return
        endpoint.in_flight -= 1
        endpoint.calls.cancel(hedge.local_id)
        endpoint.latency.late(now - hedge.sent_at, now)
        if self.group.outliers.breakers:
            self.group.judge(endpoint, Verdict.NOTHING, hedge.sent_at, now)

    def _on_failure(self, endpoint: Endpoint, reply: PredictReply, now: float) -> None:
        """Another endpoint, the fallback, or the failure is the answer."""
        code = reply.code
        if code not in _CODES:
            code = reply.code = Code.CODE_UNKNOWN
        self._judge(endpoint, reply, self.sent_at, now)
        if code == Code.CODE_DEADLINE_EXCEEDED:
            endpoint.latency.late(now - self.sent_at, now)
        elif code not in _BLAMELESS:
            endpoint.latency.penalise(now)
        if code not in _AT_FAULT and self._hedge is not None and self._hedge.endpoint is not None:
            self.tried = (*self.tried, endpoint)
            return  # the other one decides
        if code in _RETRYABLE and self._try_again(endpoint, reply, now):
            return
        if self._fallback is not None:
            self.tried = (*self.tried, endpoint)
            if self._fall_back(code, Code.Name(code).removeprefix("CODE_").lower(), now):
                return
        # What ran is in the worker's log, failures too: the worker says so by the time it took.
        self._finish(reply, ran=reply.compute_us > 0)

    def _judge(self, endpoint: Endpoint, reply: PredictReply, sent_at: float, now: float) -> None:
        """Tell the version's endpoints how this one did."""
        group, code = self.group, reply.code
        usual_s = group.outliers.usual(endpoint, endpoint.latency.value(now), sent_at)
        said = verdict(
            code,
            lost=code == Code.CODE_UNAVAILABLE and lost(reply),
            held_s=now - sent_at,
            expected_s=usual_s,
        )
        group.judge(endpoint, said, sent_at, now, usual_s)

    def _try_again(self, endpoint: Endpoint, reply: PredictReply, now: float) -> bool:
        """Whether the request is on its way to another endpoint, or waits for one."""
        dispatcher, route, target = self._dispatcher, self.route, self.target
        if route is None or target is None:
            return False
        self.tried = (*self.tried, endpoint)
        if self.attempt - self._first_attempt >= dispatcher.max_attempts - 1 or now >= self.deadline:
            return False
        gone = lost(reply)
        if gone and self._lost:
            # Two endpoints died holding it. Perhaps it is what kills them.
            return False
        self._lost = self._lost or gone
        # A worker says so of a version that it does not have, as a new process does whose last one had it and
        # is all that we have heard of. It has done nothing, so this adds no load that a budget need bound.
        absent = not gone and reply.code == Code.CODE_UNAVAILABLE
        others = any(member not in self.tried for member in dispatcher.endpoints.group(target.key).members)
        waits = dispatcher.endpoints.coming(target.key) if gone else absent and self._fallback is None
        if not (others or waits):
            return False
        if not (gone or absent or self._retrying):
            if not dispatcher.budget.take():
                return False
            self._retrying = True
            self.plain = False
        self._send_as(self.attempt + 1)
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
        self._end(code, _monotonic())
        if self.flight is not None and self._dispatcher.cache is not None:
            self._dispatcher.cache.settle(self, reply)
        if self.fell_back:
            reply.fallback = True
        reply.id = self.owner_id
        self.owner.answer(self, reply)
        if self.mirrored and code in _COMPARED and not (self.fell_back or reply.cached):
            self._mirror(reply)

    def _mirror(self, reply: PredictReply) -> None:
        """Leave the request as it was sent, and its reply, to the mirror; nobody changes them any more."""
        mirror, route, target = self._dispatcher.mirror, self.route, self.target
        if mirror is not None and route is not None and target is not None:
            took = _monotonic() - self.sent_at
            mirror.offer((*self.apart, self.payload, self.stamp), route, target, reply, took)

    def _explain(self, reply: PredictReply) -> None:
        """Complete a reply that no worker made: its words are about our connection, not the caller's."""
        if lost(reply):
            reply.message = "the worker was lost before it answered"
            reply.retry_after_ms = reply.retry_after_ms or 1000
        if self.target is not None and not reply.version:
            reply.version = self.target.version
            reply.variant = self.target.variant
            reply.experiment = self.target.experiment

    def _end(self, code: Code, now: float) -> None:
        dispatcher, target = self._dispatcher, self.target
        self.done = True
        dispatcher.budget.active -= 1
        if self._hedge is not None:
            self._drop_hedge(self._hedge, now)
        if self._retrying:
            dispatcher.budget.give_back()
        way = self.way
        totals = way.totals if way else dispatcher.stats.of(target.key if target is not None else NOWHERE)
        totals.answered(code, now - self.began_at)
        if self._span is not None:
            self._span.end(self, code)
