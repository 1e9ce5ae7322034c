"""The way of one hot request through the gateway: who calls, within limits, is it right, on to a router; and
back.

Nothing here waits. `begin` ends with the request on a channel, answered, or, where its body is large, in the
hands of a thread that passes it on; the channel's callback ends it. So a request costs no task and no future,
and the frames on both sides decide how much work is done at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import structlog
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, Priority, SealedReply
from headrace.v1.tensor_pb2 import Code
from opentelemetry.trace import SpanKind

from services.common.clock import Clock
from services.common.errors import HeadraceError, Internal, InvalidArgument, Unavailable
from services.common.frames import lost
from services.common.ids import new_id
from services.common.telemetry import Tracing, parse_traceparent, trace_bytes
from services.gateway.call import Call, Head
from services.gateway.catalogue import Catalogue
from services.gateway.channel import Cancellable
from services.gateway.codecs.priority import PRIORITIES, priority_of
from services.gateway.compression import decompressed
from services.gateway.dialects import speakers
from services.gateway.keys import Key, KeyRing, Scope
from services.gateway.metrics import GatewayMetrics
from services.gateway.reading import BodyBudget, BodyReaders
from services.gateway.regions import Regions
from services.gateway.router_client import RouterClient, failure
from services.gateway.targets import Dialect

log = structlog.get_logger(__name__)

_CLIENT_GONE = 499
_MAX_CORRELATION = 128
_MAX_DIGITS = 9
_OK = Code.CODE_OK
_LATE = Code.CODE_DEADLINE_EXCEEDED
_LOW = Priority.PRIORITY_LOW
#: Tag of PredictRequest's trace (9), and the length that every sampled context has.
_TRACE = b"\x4a\x19"


@dataclass(frozen=True, slots=True)
class PredictLimits:
    """Bounds of a request; bytes and seconds."""

    max_body_bytes: int = 32 << 20
    default_timeout_s: float = 10.0
    max_timeout_s: float = 300.0
    #: JSON that arrived compressed, unpacked: a small message must not become a large parse.
    max_unpacked_json_bytes: int = 8 << 20
    #: Bodies that have not arrived completely, of all clients together.
    max_held_bytes: int = 256 << 20
    #: Larger bodies are read in a thread.
    inline_bytes: int = 64 << 10


class PredictService:
    """Answers calls, whatever transport brought them."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        keys: KeyRing,
        router: RouterClient,
        tracing: Tracing,
        metrics: GatewayMetrics,
        clock: Clock,
        limits: PredictLimits,
        regions: Regions | None = None,
    ) -> None:
        """Without `regions`, no shared memory is served."""
        self.regions = regions or Regions(None)
        self._keys = keys
        self._router = router
        self._tracing = tracing
        self._metrics = metrics
        self._readers = BodyReaders()
        self._inline_bytes = limits.inline_bytes
        self.bodies = BodyBudget(limits.max_held_bytes, limits.max_body_bytes)
        self._monotonic = clock.monotonic
        self._unix_us = clock.unix_us
        self.speakers = speakers(catalogue, self.regions)
        self.limits = limits

    def admit(self, call: Call) -> Key:
        """Whose key says that the body of `call` is worth waiting for: `begin` checks again, for a key may be
        revoked meanwhile. Raises Unauthenticated or PermissionDenied."""
        return self._caller(call.head)

    def begin(self, call: Call) -> None:
        """Start `call`, whose headers and body are complete."""
        now = call.began = self._monotonic()
        call.request_id = new_id()
        try:
            head = call.head
            key = head.key
            if key is None or head.generation != self._keys.generation or key.expires_at_us:
                key = self._caller(head)
            self._router.admit()
            if key.bucket is not None:
                key.bucket.admit(now)
            received_at_us = self._unix_us()
            if head.content_encoding is not None or (
                len(call.body) > self._inline_bytes and not call.speaker.light(call, key)
            ):
                call.channel = self._readers.read(
                    partial(self._read, call, key, received_at_us), partial(self._was_read, call)
                )
                return
            request = call.speaker.quick(call, key, received_at_us)
            if request is None:
                request = self._as_message(call, key, received_at_us)
            call.payload = request
            self._send(call)
        except Exception as error:
            self._failed(call, error)

    def close(self) -> None:
        """Read no more large bodies."""
        self._readers.close()

    def _caller(self, head: Head) -> Key:
        """Whose key `head` carries, once it may predict; remembered there."""
        keys = self._keys
        key = keys.authenticate(head.authorization, head.api_key)
        key.require(Scope.PREDICT)
        head.key, head.generation = key, keys.generation
        return key

    def _as_message(self, call: Call, key: Key, received_at_us: int) -> bytes:
        request = PredictRequest(request_id=call.request_id, received_at_us=received_at_us, key_id=key.key_id)
        call.speaker.read(call, key, request)
        call.priority = request.priority
        return request.SerializeToString()

    def _read(self, call: Call, key: Key, received_at_us: int) -> None:
        """In a thread: unpack and read the body. Nobody else looks at `call` meanwhile."""
        head = call.head
        if head.content_encoding is not None:
            limits = self.limits
            json_only = head.json_length is None and call.target.dialect is not Dialect.GRPC
            limit = limits.max_unpacked_json_bytes if json_only else limits.max_body_bytes
            call.body = decompressed(call.body, head.content_encoding, min(limit, limits.max_body_bytes))
        request = call.speaker.quick(call, key, received_at_us)
        call.payload = self._as_message(call, key, received_at_us) if request is None else request

    def _was_read(self, call: Call, raised: BaseException | None) -> None:
        call.channel = None
        if raised is not None:
            self._failed(call, raised)
            return
        try:
            self._send(call)
        except Exception as error:
            self._failed(call, error)

    def _send(self, call: Call) -> None:
        """Pass on what was read."""
        call.body = b""
        head = call.head
        if head.priority is not None:
            call.priority = priority_of(head.priority)
            call.payload += PRIORITIES[call.priority]
        if call.priority == _LOW:
            self._router.admit_low()
        if head.traceparent is not None or self._tracing.enabled:
            self._trace(call)
        call.deadline = call.began + self._timeout_s(call)
        self._submit(call)

    def _submit(self, call: Call, tried: Cancellable | None = None) -> None:
        """On to a router, or to wait for one. Raises Unavailable."""
        router = self._router
        try:
            channel = router.pick(tried)
        except Unavailable:
            call.ticket = router.waiting.hold(partial(self._resume, call), call.deadline)
            call.channel = router.waiting
            return
        call.channel = channel
        if call.tensors is None:
            call.ticket = channel.submit_raw(call.payload, call.deadline, call.on_reply)
        else:
            call.ticket = channel.submit_raw(call.payload, call.deadline, call.on_reply, call.tensors)

    def _resume(self, call: Call) -> None:
        call.channel = None
        try:
            self._submit(call)
        except Exception as error:
            self._failed(call, error)

    def _failed(self, call: Call, error: BaseException) -> None:
        if not isinstance(error, HeadraceError):
            log.error("predict_crashed", route=call.target.dialect, exc_info=error)
            error = Internal("The gateway failed to handle this request.")
        self.refuse(call, error)

    def finish(self, call: Call, reply: SealedReply) -> None:
        """Answer `call` with the router's reply."""
        if reply.code != _OK:
            self._not_answered(call, reply)
            return
        call.channel = None
        now = self._monotonic()
        took = now - call.began
        self._router.answered(reply, took, now)
        request_id = call.request_id.hex()
        try:
            said = None
            if call.plan is not None:
                said = call.plan.answer(reply, call, request_id.encode(), took * 1000)
            if said is None:
                # Opened only here: the quick way needs no tensor as a message.
                opened = PredictReply.FromString(reply.SerializeToString())
                said = call.speaker.write(call, opened, took * 1000)
            headers, body = said
        except HeadraceError as error:
            self.refuse(call, error)
            return
        except Exception:
            model = call.model.name if call.model is not None else ""
            log.exception("answer_crashed", model=model, version=reply.version)
            self.refuse(call, Internal("The gateway failed to write the answer."))
            return
        if call.head.caller_id is None:
            lines = b"%bx-request-id: %b\r\n" % (headers, request_id.encode())
        else:
            lines = headers + _ids(call)
        call.answer(200, lines, body)
        if call.plan is not None and call.trace_context is None:
            counted = call.plan.answered
            if counted is None:
                counted = call.plan.answered = self._metrics.cell(
                    call.head.target.dialect, call.plan.model.name, 200
                ).observe
            counted(took)
        else:
            self._over(call, 200, took)

    def _not_answered(self, call: Call, reply: SealedReply) -> None:
        """`reply` is an error: it is the answer, unless the call goes on."""
        if self._retried(call, reply):
            return
        if reply.version and reply.code != _LATE:
            # Refusals that came all the way say how long that is; when nothing else comes, only they.
            now = self._monotonic()
            self._router.answered(reply, now - call.began, now)
        self.refuse(call, failure(reply))

    def refuse(self, call: Call, error: HeadraceError) -> None:
        """Answer `call` with `error`. Transports use it too, for what they find wrong before `begin`."""
        call.channel = None
        if not call.request_id:
            call.began = self._monotonic()
            call.request_id = new_id()
        status, headers, body = call.speaker.refuse(error, call.request_id.hex())
        call.answer(status, headers + _ids(call), body)
        self._over(call, status, self._monotonic() - call.began)
        if status >= 500:
            self._metrics.log_failure(log, status, call, error)

    def abandon(self, call: Call) -> None:
        """Nobody waits for the answer of `call` any more."""
        channel, call.channel = call.channel, None
        if channel is not None:
            channel.cancel(call.ticket)
            self._over(call, _CLIENT_GONE, self._monotonic() - call.began)

    def _trace(self, call: Call) -> None:
        traceparent = call.head.traceparent
        if traceparent is not None:
            call.trace_parent = parse_traceparent(traceparent)
        context = call.trace_context = self._tracing.start(call.trace_parent)
        if context is not None:
            call.started_ns = time.time_ns()
            # Where tracing is off, a caller's context comes as it was: one that is not sampled has no bytes.
            if data := trace_bytes(context):
                call.payload += _TRACE + data

    def _timeout_s(self, call: Call) -> float:
        limits = self.limits
        said = call.head.timeout
        if said is not None:
            told = int(said) if said.isdigit() and len(said) <= _MAX_DIGITS else 0
            if not 0 < told <= limits.max_timeout_s * 1000:
                raise InvalidArgument(
                    f"X-Request-Timeout-Ms must be 1 … {limits.max_timeout_s * 1000:.0f}.",
                    field="X-Request-Timeout-Ms",
                )
            return told / 1000
        if call.asked_timeout_s:
            return min(call.asked_timeout_s, limits.max_timeout_s)
        model = call.model
        return (model.timeout_s if model is not None else 0.0) or limits.default_timeout_s

    def _retried(self, call: Call, reply: SealedReply) -> bool:
        """Whether the call goes on, since the connection to its router was lost: to another, or to the same
        once it is back."""
        if call.retried or not lost(reply):
            return False
        call.retried = True
        try:
            self._submit(call, call.channel)
        except Unavailable:
            return False
        return True

    def _over(self, call: Call, status: int, took: float) -> None:
        model = call.model.name if call.model is not None else ""
        self._metrics.observe(call.target.dialect, model, status, took)
        context = call.trace_context
        if context is not None:
            self._tracing.record_span(
                call.span_name,
                call.started_ns,
                time.time_ns(),
                call.trace_parent,
                attributes={
                    "headrace.model": model,
                    "headrace.request_id": call.request_id.hex(),
                    "http.response.status_code": status,
                },
                context=context,
                kind=SpanKind.SERVER,
                error=f"HTTP {status}" if status >= 500 else None,
            )


def correlation_of(header: bytes | None) -> bytes | None:
    """What is echoed of a caller's X-Request-Id, as X-Correlation-Id. It is never the id of a request: meshes
    send one for many requests, and the id decides what is counted once and who gets which version."""
    return header if header is not None and 0 < len(header) <= _MAX_CORRELATION else None


def _ids(call: Call) -> bytes:
    """The lines of an answer that name its request."""
    correlation = correlation_of(call.head.caller_id)
    if correlation is None:
        return b"x-request-id: %s\r\n" % call.request_id.hex().encode()
    return b"x-request-id: %s\r\nx-correlation-id: %s\r\n" % (call.request_id.hex().encode(), correlation)
