"""One hot request on its way, free of the transport that brought it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from opentelemetry.trace import SpanContext

from services.gateway.catalogue import ServedModel
from services.gateway.router_client import Cancellable
from services.gateway.targets import Target

if TYPE_CHECKING:
    from services.gateway.codecs.v2 import V2State
    from services.gateway.dialects import Speaker
    from services.gateway.predict import PredictService

#: Headers that a hot request is read by, and the attribute of Call that takes each.
HEADERS = {
    b"authorization": "authorization",
    b"x-api-key": "api_key",
    b"x-request-id": "caller_id",
    b"x-request-timeout-ms": "timeout",
    b"traceparent": "traceparent",
    b"inference-header-content-length": "json_length",
    b"content-encoding": "content_encoding",
}


class Call(ABC):
    """A request and what was found out about it.

    A transport fills in the header attributes (raw bytes, None where absent) and `body`, hands the call to
    `PredictService.begin` and gets `answer` exactly once, unless it gives the call up by
    `PredictService.abandon`. Defaults are class attributes: most calls set few of them.
    """

    authorization: bytes | None = None
    api_key: bytes | None = None
    caller_id: bytes | None = None
    timeout: bytes | None = None
    traceparent: bytes | None = None
    json_length: bytes | None = None
    content_encoding: bytes | None = None
    body: bytes | bytearray = b""

    # Set by PredictService and the speakers.
    speaker: Speaker
    request_id = b""
    began = 0.0
    deadline = 0.0
    #: What the body asks for, seconds; 0: nothing.
    asked_timeout_s = 0.0
    started_ns = 0
    model: ServedModel | None = None
    #: Where the call is now, and so what cancels it by `ticket`.
    channel: Cancellable | None = None
    ticket = 0
    retried = False
    single = False
    base64 = False
    v2: V2State | None = None
    trace_parent: SpanContext | None = None
    trace_context: SpanContext | None = None
    request: PredictRequest

    def __init__(self, service: PredictService, target: Target) -> None:
        self.service = service
        self.target = target
        self.speaker = service.speakers[target.dialect]

    @abstractmethod
    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """Send the answer. `headers` are whole lines, each with its CRLF, content-length not among them."""

    def on_reply(self, reply: PredictReply) -> None:
        """What the router's channel calls."""
        self.service.finish(self, reply)
