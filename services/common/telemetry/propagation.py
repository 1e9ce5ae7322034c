"""Trace context on its way between processes: 25 bytes in frames, W3C `traceparent` in HTTP and Kafka
headers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from opentelemetry.trace import SpanContext, TraceFlags

_LENGTH = 25
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_HEADER = "traceparent"


def trace_bytes(context: SpanContext | None) -> bytes:
    """`PredictRequest.trace`: trace id (16), span id (8), flags (1); empty where there is nothing to
    record."""
    if context is None or not context.is_valid or not context.trace_flags & TraceFlags.SAMPLED:
        return b""
    return (context.trace_id << 72 | context.span_id << 8 | context.trace_flags).to_bytes(_LENGTH, "big")


def from_trace_bytes(data: bytes) -> SpanContext | None:
    """The remote parent that `trace_bytes` wrote; None for empty or impossible bytes."""
    if len(data) != _LENGTH:
        return None
    value = int.from_bytes(data, "big")
    return _remote(value >> 72, value >> 8 & 0xFFFFFFFFFFFFFFFF, value & 0xFF)


def parse_traceparent(header: bytes | str | None) -> SpanContext | None:
    """The remote parent named by a `traceparent` header; None where it is absent or malformed."""
    if not header:
        return None
    raw = header.encode("latin-1", "replace") if isinstance(header, str) else header
    matched = _TRACEPARENT.fullmatch(raw)
    if matched is None:
        return None
    version, trace_id, span_id, flags, appended = matched.groups()
    # W3C Trace Context: version ff is forbidden, 00 ends here, later versions may append fields.
    if version == b"ff" or (version == b"00" and appended):
        return None
    return _remote(int(trace_id, 16), int(span_id, 16), int(flags, 16))


def trace_bytes_of_traceparent(header: bytes) -> bytes:
    """`trace_bytes(parse_traceparent(header))`: passes a caller's context on without building a span."""
    return trace_bytes(parse_traceparent(header))


def traceparent(context: SpanContext) -> str:
    """The header that names `context` as the parent."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 0xFF:02x}"


def log_fields(context: SpanContext | None) -> dict[str, str]:
    """What a log line says to belong to `context`, where that is not the current span (those are added by
    themselves): `trace_id` and `span_id`, nothing without a context."""
    if context is None or not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def kafka_headers(context: SpanContext | None) -> tuple[tuple[str, bytes], ...]:
    """Headers for a Kafka record that continues `context`; none where there is none."""
    if context is None or not context.is_valid:
        return ()
    return ((_HEADER, traceparent(context).encode()),)


def context_from_kafka(headers: Iterable[tuple[str, bytes]]) -> SpanContext | None:
    """The context that the producer of a record put into its headers."""
    return next((parse_traceparent(value) for name, value in headers if name == _HEADER), None)


def _remote(trace_id: int, span_id: int, flags: int) -> SpanContext | None:
    if not trace_id or not span_id:
        return None
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
