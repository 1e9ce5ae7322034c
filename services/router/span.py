"""The span of one request on its way through the router, for requests that their caller sampled."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from headrace.v1.tensor_pb2 import Code
from opentelemetry.trace import SpanContext, SpanKind

from services.common.telemetry import Tracing, from_trace_bytes, trace_bytes

if TYPE_CHECKING:
    from services.router.call import Call


class RouteSpan:
    """Begun when the request was routed; what the worker records becomes its child."""

    __slots__ = ("_context", "_parent", "_started_ns", "_tracing")

    def __init__(self, tracing: Tracing, parent: SpanContext | None, context: SpanContext) -> None:
        self._tracing = tracing
        self._parent = parent
        self._context = context
        self._started_ns = time.time_ns()

    @classmethod
    def begin(cls, tracing: Tracing, call: Call) -> RouteSpan | None:
        """The span below the one that the request came with; None where nothing is recorded."""
        parent = from_trace_bytes(call.request.trace)
        context = tracing.start(parent)
        if context is None or not tracing.enabled:
            return None
        call.request.trace = trace_bytes(context)
        return cls(tracing, parent, context)

    def end(self, call: Call, code: Code) -> None:
        """The request ended with `code`."""
        request = call.request
        self._tracing.record_span(
            f"route {request.model}",
            self._started_ns,
            time.time_ns(),
            self._parent,
            attributes={
                "headrace.model": request.model,
                "headrace.version": request.version,
                "headrace.variant": request.variant,
                "headrace.attempts": call.attempt + 1,
                "headrace.fallback": call.fell_back,
                "headrace.code": Code.Name(code),
            },
            context=self._context,
            kind=SpanKind.SERVER,
            error=None if code == Code.CODE_OK else Code.Name(code),
        )
