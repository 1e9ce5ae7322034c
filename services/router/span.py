"""The span of one request on its way through the router, for requests that their caller sampled."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from headrace.v1.tensor_pb2 import Code
from opentelemetry.trace import SpanContext, SpanKind

from services.common.telemetry import Tracing, from_trace_bytes, trace_bytes

if TYPE_CHECKING:
    from services.router.routed import Routed


class RouteSpan:
    """Begun when the request was routed; what the worker records becomes its child."""

    __slots__ = ("_parent", "_span", "_started_ns", "_tracing", "context")

    def __init__(self, tracing: Tracing, parent: SpanContext | None, context: SpanContext) -> None:
        self._tracing = tracing
        self._parent = parent
        self._span = context
        #: What the worker records below; PredictRequest.trace.
        self.context = trace_bytes(context)
        self._started_ns = time.time_ns()

    @classmethod
    def begin(cls, tracing: Tracing, call: Routed) -> RouteSpan | None:
        """The span below the one that the request came with; None where nothing is recorded."""
        parent = from_trace_bytes(call.request.trace)
        context = tracing.start(parent)
        if context is None or not tracing.enabled:
            return None
        return cls(tracing, parent, context)

    def end(self, call: Routed, code: Code) -> None:
        """The request ended with `code`."""
        model, target = call.request.model, call.target
        self._tracing.record_span(
            f"route {model}",
            self._started_ns,
            time.time_ns(),
            self._parent,
            attributes={
                "headrace.model": model,
                "headrace.version": target.version if target is not None else "",
                "headrace.variant": target.variant if target is not None else "",
                "headrace.experiment": target.experiment if target is not None else "",
                "headrace.attempts": call.attempt + 1,
                "headrace.fallback": call.fell_back,
                "headrace.code": Code.Name(code),
            },
            context=self._span,
            kind=SpanKind.SERVER,
            error=None if code == Code.CODE_OK else Code.Name(code),
        )
