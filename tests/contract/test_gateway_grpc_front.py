"""The gRPC front over sockets, as clients of three kinds see it: grpcio, its asyncio side, and grpclib."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpclib.client import Channel
from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import DataType, Tensor
from open_inference import open_inference_pb2 as oip
from open_inference import open_inference_pb2_grpc as oip_grpc

from tests.fixtures.gateway import GatewayThread, answer_like_a_worker, running_gateway
from tests.fixtures.grpc_gateway import KEY, OPTIONS, gateway, infer, shared
from tests.fixtures.waiting import PATIENCE_S, eventually, patience

__all__ = ["gateway", "shared"]

PATH = "/inference.GRPCInferenceService/ModelInfer"
#: Larger than any window, and than one message of grpcio's default.
LARGE = 20 << 20


def label(answer: oip.ModelInferResponse) -> int:
    return int(struct.unpack_from("<q", answer.raw_output_contents[0])[0])


@asynccontextmanager
async def calling(port: int) -> AsyncIterator[oip_grpc.GRPCInferenceServiceStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        yield oip_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


async def test_many_calls_at_once_over_one_connection(gateway: GatewayThread) -> None:
    async with calling(gateway.running.gateway.grpc_port) as stub:

        async def one(number: int) -> int:
            packed = (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate)[
                number % 3
            ]
            # Deadlines that differ, so that few heads are alike.
            timeout = PATIENCE_S + number % 7
            answer = await stub.ModelInfer(
                infer(number % 30), metadata=KEY, timeout=timeout, compression=packed
            )
            return label(answer)

        async with asyncio.timeout(PATIENCE_S):
            found = await asyncio.gather(*(one(number) for number in range(150)))
    assert found == [int(number % 30 < 15) for number in range(150)]


async def test_large_messages_both_ways(gateway: GatewayThread) -> None:
    rows = LARGE // 12

    def echo(request: PredictRequest) -> PredictReply:
        assert len(request.inputs[0].data) == rows * 12
        data = request.inputs[0].data[::-1]
        tensor = Tensor(name="label", datatype=DataType.DATA_TYPE_INT8, shape=[len(data)], data=data)
        return PredictReply(id=request.id, version="1", outputs=[tensor])

    gateway.running.router.answer = echo
    async with calling(gateway.running.gateway.grpc_port) as stub:
        large, small = await asyncio.gather(
            stub.ModelInfer(infer(rows=rows), metadata=KEY, timeout=PATIENCE_S),
            stub.ServerLive(oip.ServerLiveRequest(), timeout=PATIENCE_S),
        )
    assert large.raw_output_contents[0] == (struct.pack("<3f", 1, 2, 3) * rows)[::-1]
    assert small.live


async def test_a_cancelled_call_is_taken_out_of_where_it_waits(gateway: GatewayThread) -> None:
    router = gateway.running.router
    router.answer = lambda _request: None
    async with calling(gateway.running.gateway.grpc_port) as stub:
        asked, given_up = len(router.requests), len(router.cancelled)
        cancelled = stub.ModelInfer(infer(), metadata=KEY, timeout=PATIENCE_S)
        waiting = asyncio.ensure_future(_code(cancelled))
        await eventually(lambda: len(router.requests) > asked)
        cancelled.cancel()
        assert await waiting is grpc.StatusCode.CANCELLED
        await eventually(lambda: len(router.cancelled) > given_up)
        late = stub.ModelInfer(infer(), metadata=KEY, timeout=0.3)
        assert await _code(late) is grpc.StatusCode.DEADLINE_EXCEEDED
        router.answer = answer_like_a_worker
        assert label(await stub.ModelInfer(infer(), metadata=KEY, timeout=PATIENCE_S)) == 1


async def _code(call: grpc.aio.UnaryUnaryCall[object, object]) -> grpc.StatusCode:
    return await call.code()


async def test_words_that_are_not_ascii_arrive(gateway: GatewayThread) -> None:
    asked = infer()
    asked.inputs[0].name = "Größe 100%"
    async with calling(gateway.running.gateway.grpc_port) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ModelInfer(asked, metadata=KEY, timeout=PATIENCE_S)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Größe 100%" in str(raised.value.details())


async def test_grpclib(gateway: GatewayThread) -> None:
    channel = Channel("127.0.0.1", gateway.running.gateway.grpc_port)
    try:
        async with patience("the answers"):
            for metadata in (KEY, (("x-api-key", "hr_nobody"),), KEY):
                async with channel.request(
                    PATH, Cardinality.UNARY_UNARY, oip.ModelInferRequest, oip.ModelInferResponse,
                    metadata=list(metadata), timeout=PATIENCE_S,
                ) as stream:  # fmt: skip
                    await stream.send_message(infer(20.0), end=True)
                    if metadata is KEY:
                        answer = await stream.recv_message()
                        assert answer is not None
                        assert label(answer) == 0
                    else:
                        with pytest.raises(GRPCError) as raised:
                            await stream.recv_message()
                        assert raised.value.status.value == grpc.StatusCode.UNAUTHENTICATED.value[0]
    finally:
        channel.close()


async def test_unknown_methods_and_unreadable_messages(gateway: GatewayThread) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.running.gateway.grpc_port}") as channel:
        for path, body, code in (
            ("/inference.GRPCInferenceService/Nothing", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("/nobody.Knows/It", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("/inference.GRPCInferenceService/ModelReady", b"\xff", grpc.StatusCode.INTERNAL),
            ("/inference.GRPCInferenceService/ModelReady", bytes(20_000), grpc.StatusCode.RESOURCE_EXHAUSTED),
            (PATH, b"\xff", grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(path, bytes, bytes)(body, metadata=KEY, timeout=PATIENCE_S)
            assert raised.value.code() is code


async def test_health_is_watched_and_reflection_answers_in_turn(gateway: GatewayThread) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.running.gateway.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=PATIENCE_S)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService"))
        async with patience("the first state"):
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()

        async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            yield reflection_pb2.ServerReflectionRequest(
                file_containing_symbol="inference.GRPCInferenceService"
            )
            yield reflection_pb2.ServerReflectionRequest(file_by_filename="nothing.proto")

        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        async with patience("the descriptions"):
            said = [answer async for answer in reflection.ServerReflectionInfo(ask())]
        names = [service.name for service in said[0].list_services_response.service]
        assert "grpc.health.v1.Health" in names
        described = FileDescriptorProto.FromString(said[1].file_descriptor_response.file_descriptor_proto[0])
        assert described.package == "inference"
        assert said[2].error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_who_watches_hears_of_the_end_though_another_watcher_has_left(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as running:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{running.gateway.grpc_port}")
        health = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
        leaves, stays = health.Watch(asked), health.Watch(asked)
        async with patience("the first states"):
            for watch in (leaves, stays):
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        leaves.cancel()
        await health.Check(asked, timeout=PATIENCE_S)  # the gateway has read of it by then

        async def last() -> int:
            status = (await stays.read()).status
            stays.cancel()  # the connection's end waits for it
            return int(status)

        heard = asyncio.create_task(last())
    assert await heard == health_pb2.HealthCheckResponse.NOT_SERVING
    await channel.close(None)


async def test_a_call_under_way_is_answered_while_the_gateway_ends(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, drain_s=PATIENCE_S) as running:
        running.router.answer = lambda _request: None
        stub_of = calling(running.gateway.grpc_port)
        stub = await stub_of.__aenter__()
        call = asyncio.ensure_future(_label(stub))
        await eventually(lambda: running.router.requests)

        async def answer_later() -> None:
            # Draining has begun once nobody new gets in.
            await eventually(lambda: _refuses(running.gateway.grpc_port))
            running.router.peers[-1].reply(answer_like_a_worker(running.router.requests[-1]))

        late = asyncio.create_task(answer_later())
    await late
    assert await call == 1
    await stub_of.__aexit__(None, None, None)


async def _label(stub: oip_grpc.GRPCInferenceServiceStub) -> int:
    return label(await stub.ModelInfer(infer(), metadata=KEY, timeout=PATIENCE_S))


async def _refuses(port: int) -> bool:
    try:
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return True
    writer.close()
    return False
