"""Spans of OpenTelemetry, in two ways: `span` for ordinary code, `start` and `record_span` for the hot path,
where a request's span is named at once (so that the next hop can be its child) and recorded once it is
over."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_TRACE_ID_LIMIT = 1 << 64
_EXPORT_S = 5
_CLOSE_S = 5.0
_QUEUE_SPANS = 8192
_OK = Status(StatusCode.UNSET)

_random = random.Random(os.urandom(16))
os.register_at_fork(after_in_child=lambda: _random.seed(os.urandom(16)))


class Tracing:
    """Where the spans of one process go. `enabled` is False without an exporter: then `start` and
    `record_span` return at once, and a caller's context passes through unchanged."""

    def __init__(self, service: str, sample_ratio: float, processor: SpanProcessor | None) -> None:
        self.enabled = processor is not None
        self._processor = processor
        self._sampled_below = round(sample_ratio * _TRACE_ID_LIMIT)
        # A process id alone is the same in every container of a service.
        instance = f"{socket.gethostname()}-{os.getpid()}"
        self._resource = Resource.create({"service.name": service, "service.instance.id": instance})
        self._scope = InstrumentationScope("headrace")

    def start(self, parent: SpanContext | None = None) -> SpanContext | None:
        """Name a span that begins now; None: it is not sampled, record nothing and pass nothing on.

        With a parent its decision holds, else `sample_ratio` of the traces are kept. Where tracing is off,
        the parent itself is returned, so that the trace of callers before and after us stays whole.
        """
        if not self.enabled:
            return parent
        if parent is not None:
            if not parent.trace_flags & TraceFlags.SAMPLED:
                return None
            return SpanContext(parent.trace_id, _span_id(), is_remote=False, trace_flags=_SAMPLED)
        trace_id = _random.getrandbits(128) or 1
        if trace_id & (_TRACE_ID_LIMIT - 1) >= self._sampled_below:
            return None
        return SpanContext(trace_id, _span_id(), is_remote=False, trace_flags=_SAMPLED)

    def record_span(  # noqa: PLR0913 - the parts of a span
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        parent: SpanContext | None = None,
        links: Sequence[SpanContext] = (),
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        context: SpanContext | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        error: str | None = None,
    ) -> None:
        """Record a span that is over. Times are Unix nanoseconds; `context` is what `start` named it, or
        None for a new child of `parent` (a new trace without one). `error` marks it as failed. Unsampled:
        nothing happens."""
        if self._processor is None:
            return
        context = context or self.start(parent)
        if context is None:
            return
        self._processor.on_end(
            ReadableSpan(
                name=name,
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                links=[Link(link) for link in links],
                kind=kind,
                status=_OK if error is None else Status(StatusCode.ERROR, error),
                start_time=start_ns,
                end_time=end_ns,
                instrumentation_scope=self._scope,
            )
        )

    @contextmanager
    def span(
        self,
        name: str,
        *,
        parent: SpanContext | None = None,
        links: Sequence[SpanContext] = (),
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> Iterator[SpanContext | None]:
        """Record the block as a span and make it current, so that logs and inner spans name it. Without
        `parent` it continues the current span. An exception marks it as failed and goes on."""
        parent = parent or current_context()
        context = self.start(parent)
        if context is None or self._processor is None:
            yield context
            return
        begun = time.time_ns()
        error: str | None = None
        try:
            with trace.use_span(
                trace.NonRecordingSpan(context), record_exception=False, set_status_on_exception=False
            ):
                yield context
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            self.record_span(
                name,
                begun,
                time.time_ns(),
                parent,
                links,
                attributes,
                context=context,
                kind=kind,
                error=error,
            )

    async def close(self) -> None:
        """Send what is left, for 5 s at most."""
        if self._processor is None:
            return
        processor, self._processor, self.enabled = self._processor, None, False
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def shut() -> None:
            try:
                processor.shutdown()
            finally:
                with suppress(RuntimeError):  # the loop did not wait so long
                    loop.call_soon_threadsafe(over.set)

        # Not a thread of the loop's pool, whose end a loop waits for: with a collector that is away, this
        # takes half a minute.
        threading.Thread(target=shut, name="tracing-close", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await over.wait()


def setup_tracing(
    service: str, otlp_endpoint: str | None, sample_ratio: float = 1.0, exporter: SpanExporter | None = None
) -> Tracing:
    """Tracing to an OTLP gRPC endpoint (`http://host:4317`, `https://…` for TLS), or to `exporter`. Without
    either nothing is recorded. Export happens in a thread with a bounded queue; what does not fit is
    dropped."""
    if exporter is None and otlp_endpoint:
        exporter = _otlp_exporter(otlp_endpoint)
    if exporter is None:
        return Tracing(service, sample_ratio, None)
    return Tracing(
        service,
        sample_ratio,
        BatchSpanProcessor(exporter, max_queue_size=_QUEUE_SPANS, schedule_delay_millis=1000),
    )


def current_context() -> SpanContext | None:
    """The context of the current span, None where there is none."""
    context = trace.get_current_span().get_span_context()
    return context if context.is_valid else None


def _otlp_exporter(endpoint: str) -> SpanExporter:
    # Imported here: a process without an endpoint does not pay for grpcio's start.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

    return OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https://"), timeout=_EXPORT_S)


def _span_id() -> int:
    return _random.getrandbits(64) or 1
