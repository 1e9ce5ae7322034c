"""Logs and traces. logs.py: JSON lines with trace ids. seldom.py: when what repeats itself is told.
propagation.py: trace context in bytes, HTTP and Kafka headers. tracing.py: sampling, finished spans, ordinary
spans. asgi.py: one span per HTTP request (`TraceRequests`)."""

from services.common.telemetry.logs import flush_logs, setup_logging
from services.common.telemetry.propagation import (
    context_from_kafka,
    from_trace_bytes,
    kafka_headers,
    log_fields,
    parse_traceparent,
    trace_bytes,
    trace_bytes_of_traceparent,
    traceparent,
)
from services.common.telemetry.tracing import Tracing, current_context, setup_tracing

__all__ = [
    "Tracing",
    "context_from_kafka",
    "current_context",
    "flush_logs",
    "from_trace_bytes",
    "kafka_headers",
    "log_fields",
    "parse_traceparent",
    "setup_logging",
    "setup_tracing",
    "trace_bytes",
    "trace_bytes_of_traceparent",
    "traceparent",
]
