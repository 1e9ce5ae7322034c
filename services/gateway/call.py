"""One hot request on its way, free of the transport that brought it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, SealedReply
from opentelemetry.trace import SpanContext

from services.common.errors import HeadraceError
from services.common.frames.detached import Buffer
from services.common.native import mypyc_attr
from services.gateway.asked import Answers
from services.gateway.catalogue import ServedModel
from services.gateway.channel import Cancellable
from services.gateway.codecs.places import OutputPlaces
from services.gateway.codecs.v2 import V2State
from services.gateway.keys import Key
from services.gateway.targets import Target

if TYPE_CHECKING:
    from services.gateway.predict import PredictService

#: Headers that a hot request is read by, and the attribute of Head that takes each.
HEADERS = {
    b"authorization": "authorization",
    b"x-api-key": "api_key",
    b"x-request-id": "caller_id",
    b"x-request-timeout-ms": "timeout",
    b"x-request-priority": "priority",
    b"traceparent": "traceparent",
    b"inference-header-content-length": "json_length",
    b"content-encoding": "content_encoding",
}


class Head:
    """What is said of a request before its body. Headers are raw bytes, None where absent."""

    __slots__ = (
        "api_key",
        "authorization",
        "caller_id",
        "content_encoding",
        "generation",
        "json_length",
        "key",
        "length",
        "odd",
        "priority",
        "target",
        "timeout",
        "timeout_s",
        "traceparent",
    )

    def __init__(self, target: Target) -> None:
        self.target = target
        self.authorization: bytes | None = None
        self.api_key: bytes | None = None
        self.caller_id: bytes | None = None
        self.timeout: bytes | None = None
        self.priority: bytes | None = None
        self.traceparent: bytes | None = None
        self.json_length: bytes | None = None
        self.content_encoding: bytes | None = None
        #: Bytes of the body; -1: not known beforehand.
        self.length = -1
        #: Whose key it carries, as of that generation of the key ring.
        self.key: Key | None = None
        self.generation = -1
        #: How many of its bodies in a row were not of the most common form.
        self.odd = 0
        #: The deadline of a gRPC call, as a duration; 0: none.
        self.timeout_s = 0.0

    def copy(self) -> Head:
        """Another that says the same, to be changed for one call."""
        head = Head(self.target)
        for name in HEADERS.values():
            setattr(head, name, getattr(self, name))
        head.length, head.odd, head.timeout_s = self.length, self.odd, self.timeout_s
        head.key, head.generation = self.key, self.generation
        return head


class Speaker(Protocol):
    """One dialect. `read` sets `call.model` as soon as it is known; headers are lines with their CRLF.

    `quick` gives the serialized request where the body is of the most common form, and sets `call.plan` by
    which its answer is written; None, and nothing set, where `read` is needed. It raises nothing.

    `light` tells whether a large body is read in no time, since all but a little of it are numbers that stay
    where they are.
    """

    def light(self, call: Call, key: Key) -> bool: ...

    def quick(self, call: Call, key: Key, received_at_us: int) -> bytes | None: ...

    def read(self, call: Call, key: Key, request: PredictRequest) -> None: ...

    def write(self, call: Call, reply: PredictReply, latency_ms: float) -> tuple[bytes, bytes]: ...

    def refuse(self, error: HeadraceError, request_id: str) -> tuple[int, bytes, bytes]: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class Call(ABC):
    """A request and what was found out about it.

    A transport makes the head, sets `body`, hands the call to `PredictService.begin` and gets `answer`
    exactly once, unless it gives the call up by `PredictService.abandon`. Defaults are class attributes: most
    calls set few of them.
    """

    body: bytes | bytearray = b""

    # Set by PredictService and the speakers.
    speaker: Speaker
    request_id = b""
    began = 0.0
    deadline = 0.0
    #: What the body asks for, seconds; 0: nothing.
    asked_timeout_s = 0.0
    started_ns = 0
    #: A `Priority`.
    priority = 0
    model: ServedModel | None = None
    #: Where it is set, the answer is written by it.
    plan: Answers | None = None
    #: The serialized PredictRequest.
    payload = b""
    #: What stands before `payload`: its large tensors, where they arrived.
    tensors: tuple[Buffer, ...] | None = None
    #: Where the call is now, and so what cancels it by `ticket`.
    channel: Cancellable | None = None
    ticket = 0
    retried = False
    single = False
    #: The id that the caller gave the request, where the answer repeats it.
    asked_id = b""
    base64 = False
    v2: V2State | None = None
    #: Where outputs are wanted that shall not come with the answer. Such a call has no plan.
    places: OutputPlaces | None = None
    #: How many of their best classes outputs are wanted as. Such a call has no plan either.
    classes: dict[str, int] | None = None
    trace_parent: SpanContext | None = None
    trace_context: SpanContext | None = None

    def __init__(self, service: PredictService, head: Head) -> None:
        self.service = service
        self.head = head
        self.speaker = service.speakers[head.target.dialect]

    @property
    def target(self) -> Target:
        """The route."""
        return self.head.target

    @property
    def span_name(self) -> str:
        """What it is called in traces."""
        return f"POST {self.head.target.dialect}"

    @abstractmethod
    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """Send the answer. `headers` are whole lines, each with its CRLF, content-length not among them."""

    def on_reply(self, reply: SealedReply) -> None:
        """What the router's channel calls."""
        self.service.finish(self, reply)
