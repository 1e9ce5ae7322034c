"""The internal credential and the span exporter, each against a real grpcio peer on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from services.common.grpc_auth import InternalAuthInterceptor, metadata
from services.common.telemetry import setup_tracing

_TOKEN = "0123456789abcdef"


async def _unary(request: bytes, _context: Any) -> bytes:
    return request


async def _stream(requests: Any, _context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[InternalAuthInterceptor(_TOKEN)])
    echo = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary),
        "Stream": grpc.stream_stream_rpc_method_handler(_stream),
    }
    health = {"Check": grpc.unary_unary_rpc_method_handler(_unary)}
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("test.Echo", echo),
            grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def test_the_token_opens_unary_and_streaming_calls(channel: grpc.aio.Channel) -> None:
    unary = channel.unary_unary("/test.Echo/Unary", bytes, bytes)
    assert await unary(b"hello", metadata=metadata(_TOKEN), timeout=5) == b"hello"
    stream = channel.stream_stream("/test.Echo/Stream", bytes, bytes)
    call = stream(iter([b"a", b"b"]), metadata=metadata(_TOKEN), timeout=5)
    assert [reply async for reply in call] == [b"a", b"b"]


@pytest.mark.parametrize("given", [(), metadata("wrong"), metadata(_TOKEN) * 2])
async def test_without_it_calls_end_unauthenticated(
    channel: grpc.aio.Channel, given: tuple[tuple[str, str], ...]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test.Echo/Unary", bytes, bytes)(b"hello", metadata=given, timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    stream = channel.stream_stream("/test.Echo/Stream", bytes, bytes)(iter([b"a"]), metadata=given, timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [reply async for reply in stream]
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_needs_no_token(channel: grpc.aio.Channel) -> None:
    assert await channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)(b"", timeout=5) == b""


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the name in the service
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_reach_an_otlp_collector() -> None:
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]  # generated code
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    tracing = setup_tracing("gateway", f"http://127.0.0.1:{port}", 1.0)
    context = tracing.start()
    assert context is not None
    tracing.record_span("predict", 1_000, 2_000, None, attributes={"model": "cancer"}, context=context)
    await tracing.close()
    await server.stop(0)
    (request,) = collector.requests
    (spans,) = (scope.spans for scope in request.resource_spans[0].scope_spans)
    assert [span.name for span in spans] == ["predict"]
    assert spans[0].trace_id == context.trace_id.to_bytes(16, "big")
    assert spans[0].start_time_unix_nano == 1_000
