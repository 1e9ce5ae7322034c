from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, StatusCode, TraceFlags

from services.common.telemetry import (
    Tracing,
    context_from_kafka,
    current_context,
    from_trace_bytes,
    kafka_headers,
    log_fields,
    parse_traceparent,
    setup_tracing,
    trace_bytes,
    trace_bytes_of_traceparent,
    traceparent,
)
from services.common.telemetry import tracing as tracing_module
from services.common.telemetry.asgi import TraceRequests

_ROOT = Path(__file__).resolve().parents[3]
_HEADER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

contexts = st.builds(
    lambda trace_id, span_id: SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(1)),
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
)


@given(contexts)
def test_a_context_survives_every_way_between_processes(context: SpanContext) -> None:
    assert len(trace_bytes(context)) == 25
    assert from_trace_bytes(trace_bytes(context)) == context
    assert parse_traceparent(traceparent(context)) == context
    assert context_from_kafka((("other", b"x"), *kafka_headers(context))) == context
    assert trace_bytes_of_traceparent(traceparent(context).encode()) == trace_bytes(context)


def test_a_log_line_names_a_context_as_its_traceparent_does() -> None:
    fields = log_fields(parse_traceparent(_HEADER))
    assert f"00-{fields['trace_id']}-{fields['span_id']}-01" == _HEADER
    assert log_fields(None) == {}


def test_the_25_bytes_are_trace_id_span_id_flags() -> None:
    parsed = parse_traceparent(_HEADER)
    expected = bytes.fromhex("0af7651916cd43dd8448eb211c80319c" + "b7ad6b7169203331" + "01")
    assert trace_bytes(parsed) == expected


def test_what_is_not_sampled_takes_no_room_in_a_frame() -> None:
    assert trace_bytes(parse_traceparent(_HEADER[:-2] + "00")) == b""
    assert trace_bytes(None) == b""
    assert from_trace_bytes(b"") is None
    assert kafka_headers(None) == ()


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "nonsense",
        _HEADER.upper(),
        _HEADER[:-1],
        _HEADER + "0",
        _HEADER + "-more",
        "ff" + _HEADER[2:],
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        "é" + _HEADER[1:],
    ],
)
def test_a_malformed_traceparent_is_ignored(header: str | None) -> None:
    assert parse_traceparent(header) is None


def test_a_later_version_may_append_fields() -> None:
    assert parse_traceparent("01" + _HEADER[2:] + "-more") == parse_traceparent(_HEADER)


@given(st.binary(max_size=80))
def test_no_bytes_break_the_parsers(data: bytes) -> None:
    parse_traceparent(data)
    from_trace_bytes(data)


def _tracing(ratio: float = 1.0) -> tuple[Tracing, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    return setup_tracing("test", None, ratio, exporter), exporter


async def test_a_finished_span_keeps_the_name_that_it_was_given() -> None:
    tracing, exporter = _tracing()
    parent = parse_traceparent(_HEADER)
    context = tracing.start(parent)
    assert context is not None
    link = tracing.start()
    assert link is not None
    tracing.record_span(
        "frame",
        1_000,
        3_000,
        parent,
        [link],
        {"items": 3},
        context=context,
        kind=SpanKind.CLIENT,
        error="lost",
    )
    await tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.context == context
    assert span.parent == parent
    assert (span.start_time, span.end_time, span.kind) == (1_000, 3_000, SpanKind.CLIENT)
    assert [found.context for found in span.links] == [link]
    assert dict(span.attributes or {}) == {"items": 3}
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "lost")
    assert span.resource.attributes["service.name"] == "test"


async def test_spans_nest_and_failures_are_marked() -> None:
    tracing, exporter = _tracing()

    def failing() -> None:
        with tracing.span("outer") as outer, tracing.span("inner"):
            inner = current_context()
            assert inner is not None
            assert outer is not None
            assert inner.trace_id == outer.trace_id
            raise KeyError("x")

    with pytest.raises(KeyError):
        failing()
    assert current_context() is None
    await tracing.close()
    inner, outer = exporter.get_finished_spans()
    assert (inner.name, outer.name) == ("inner", "outer")
    assert inner.parent == outer.context
    assert inner.status.status_code is StatusCode.ERROR
    assert outer.parent is None


async def test_the_ratio_decides_for_roots_and_the_parent_for_children() -> None:
    tracing, _exporter = _tracing(0.25)
    kept = sum(tracing.start() is not None for _ in range(4_000))
    assert 800 < kept < 1_200
    never, _exporter = _tracing(0.0)
    assert never.start() is None
    assert never.start(parse_traceparent(_HEADER)) is not None
    assert tracing.start(parse_traceparent(_HEADER[:-2] + "00")) is None
    await tracing.close()
    await never.close()


async def test_without_an_exporter_nothing_is_recorded_and_the_trace_passes_through() -> None:
    tracing = setup_tracing("test", "", 1.0)
    assert not tracing.enabled
    assert tracing.start() is None
    parent = parse_traceparent(_HEADER)
    assert tracing.start(parent) is parent
    with tracing.span("x", parent=parent) as context:
        assert context is parent
    tracing.record_span("x", 1, 2)
    await tracing.close()


async def test_after_close_nothing_is_recorded() -> None:
    tracing, exporter = _tracing()
    await tracing.close()
    tracing.record_span("late", 1, 2)
    assert tracing.start() is None
    assert exporter.get_finished_spans() == ()


def test_a_collector_that_is_away_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor goes on for half a minute; neither `close` nor the end of the loop waits for it."""
    monkeypatch.setattr(tracing_module, "_CLOSE_S", 0.01)
    back, gave_up = threading.Event(), threading.Event()

    class Away(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            back.wait(3)
            gave_up.set()
            return SpanExportResult.FAILURE

    async def service() -> None:
        tracing = setup_tracing("test", None, 1.0, Away())
        tracing.record_span("x", 1, 2)
        await tracing.close()

    asyncio.run(service())
    waited = gave_up.is_set()
    back.set()
    assert not waited


async def test_processes_of_two_containers_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each the service has the same process id."""
    seen = set()
    for host in ("3f2a", "91bc"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        tracing, exporter = _tracing()
        tracing.record_span("x", 1, 2)
        await tracing.close()
        (span,) = exporter.get_finished_spans()
        seen.add(span.resource.attributes["service.instance.id"])
    assert len(seen) == 2


async def test_http_requests_become_server_spans_of_their_callers_trace() -> None:
    tracing, exporter = _tracing()
    seen: list[SpanContext | None] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        seen.append(current_context())
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    transport = httpx.ASGITransport(TraceRequests(app, tracing))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/things", headers={"traceparent": _HEADER})
        await client.get("/health/live", headers={"traceparent": _HEADER})
    await tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.context == seen[0]
    assert seen[1] is None
    assert span.parent == parse_traceparent(_HEADER)
    assert dict(span.attributes or {}) == {"http.request.method": "GET", "http.response.status_code": 503}
    assert span.status.status_code is StatusCode.ERROR


def _logged(program: str) -> list[dict[str, Any]]:
    """What a process that runs `program` logs."""
    start = (
        "import logging, structlog, sys\n"
        "from services.common.telemetry import *\n"
        "log = structlog.get_logger('mine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start + dedent(program)],
        env=os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT / 'proto'}"},
        capture_output=True,
        timeout=30,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_log_line_is_json_with_the_same_head() -> None:
    lines = _logged(
        """
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        setup_logging("router")
        tracing = setup_tracing("router", None, 1.0, InMemorySpanExporter())
        with tracing.span("x"):
            log.info("inside", model="cancer")
        logging.getLogger("library").warning("said %s", "it", extra={"code": 7})
        logging.getLogger("aiokafka").info("noise")
        logging.getLogger("uvicorn.access").info("noise")
        log.debug("too quiet")
        try:
            1 / 0
        except ZeroDivisionError:
            log.exception("failed", odd={1, 2}.__class__)
        """
    )
    assert [line["event"] for line in lines] == ["inside", "said it", "failed"]
    assert all(list(line)[:4] == ["ts", "level", "service", "event"] for line in lines)
    assert {line["service"] for line in lines} == {"router"}
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    inside, library, failed = lines
    assert (len(inside["trace_id"]), len(inside["span_id"]), inside["model"]) == (32, 16, "cancer")
    assert "trace_id" not in library
    assert (library["logger"], library["code"]) == ("library", 7)
    assert "ZeroDivisionError" in failed["exception"]


def test_lines_for_people_show_no_local_variables(capfd: pytest.CaptureFixture[str]) -> None:
    program = """
        from services.common.telemetry import flush_logs, setup_logging
        import structlog
        setup_logging("gateway", json=False)
        def authenticate(key):
            return key / 0
        try:
            authenticate(float("11235813"))
        except ZeroDivisionError:
            structlog.get_logger("mine").exception("failed")
        flush_logs()
    """
    paths = {"PYTHONPATH": f"{_ROOT}:{_ROOT / 'proto'}"}
    subprocess.run([sys.executable, "-c", dedent(program)], env=os.environ | paths, timeout=30, check=True)
    said = capfd.readouterr().out
    assert "ZeroDivisionError" in said
    assert "11235813.0" not in said


def test_two_services_of_one_process_are_told_apart() -> None:
    lines = _logged(
        """
        setup_logging("gateway")
        structlog.get_logger("services.router.call").info("its own")
        logging.getLogger("services.router.call").warning("its own")
        log.info("of the process")
        with structlog.contextvars.bound_contextvars(service="router"):
            logging.getLogger("services.common.bus").warning("of its context")
            structlog.get_logger("services.gateway.app").info("of the other one")
        """
    )
    assert [line["service"] for line in lines] == ["router", "router", "gateway", "router", "gateway"]


def test_a_library_that_repeats_itself_is_heard_now_and_then() -> None:
    lines = _logged(
        """
        import time
        setup_logging("router")
        moment = 1000.0
        time.monotonic = lambda: moment
        for second in range(25):
            moment = 1000.0 + second
            for pause in range(10):
                logging.getLogger("aiokafka").error("Unable connect to node with id %s: in %s s", 0, pause)
                logging.getLogger("aiokafka.cluster").error("No broker metadata found")
                logging.getLogger("services.common.bus.kafka").warning("ours")
        """
    )
    told = [line for line in lines if line["logger"] == "aiokafka"]
    assert [line["event"] for line in told] == ["Unable connect to node with id 0: in 0 s"] * 3
    assert [line.get("untold") for line in told] == [None, 99, 99]
    assert sum(line["logger"] == "aiokafka.cluster" for line in lines) == 3
    assert sum(line["event"] == "ours" for line in lines) == 250


def test_what_a_library_says_of_another_thing_is_not_the_same() -> None:
    """Else of all topics that are missing one would be named, at each time the first."""
    lines = _logged(
        """
        setup_logging("registry")
        for _ in range(3):
            for topic in ("analytics.verdicts.v1", "drift.alerts.v1"):
                logging.getLogger("aiokafka.cluster").error("Topic %s not found in cluster metadata", topic)
        """
    )
    assert [line["event"] for line in lines] == [
        "Topic analytics.verdicts.v1 not found in cluster metadata",
        "Topic drift.alerts.v1 not found in cluster metadata",
    ]


def test_what_a_full_queue_drops_is_counted() -> None:
    lines = _logged(
        """
        import threading
        setup_logging("router")
        from services.common.telemetry import logs
        gate = threading.Event()
        write = sys.stdout.write
        def slow(text):
            gate.wait(60)
            return write(text)
        sys.stdout.write = slow
        for number in range(logs._QUEUE_LINES + 50):
            log.info("line", number=number)
        gate.set()
        flush_logs()
        """
    )
    events = [line["event"] for line in lines]
    assert all(list(line)[:4] == ["ts", "level", "service", "event"] for line in lines)
    assert {line["service"] for line in lines} == {"router"}
    dropped = next(line["count"] for line in lines if line["event"] == "log_lines_dropped")
    assert 40 <= dropped <= 50
    assert events.count("line") + dropped == 10_050
