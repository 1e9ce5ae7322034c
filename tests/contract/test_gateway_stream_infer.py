"""ModelStreamInfer over sockets, as grpcio's clients see it, its asyncio side and its threads."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from open_inference import open_inference_pb2 as oip
from open_inference import open_inference_pb2_grpc as oip_grpc

from tests.fixtures.gateway import GatewayThread, answer_like_a_worker, running_gateway
from tests.fixtures.grpc_gateway import KEY, OPTIONS, gateway, infer, shared
from tests.fixtures.waiting import PATIENCE_S, eventually, patience, until

__all__ = ["gateway", "shared"]


def label(said: oip.ModelStreamInferResponse) -> int:
    assert not said.error_message
    return int(struct.unpack_from("<q", said.infer_response.raw_output_contents[0])[0])


def stub_of(channel: grpc.aio.Channel | grpc.Channel) -> oip_grpc.GRPCInferenceServiceStub:
    return oip_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("packed", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_thousand_requests_beside_a_call(gateway: GatewayThread, packed: grpc.Compression) -> None:
    """More than are under way at once."""
    count = 1000

    async def ask() -> AsyncIterator[oip.ModelInferRequest]:
        for number in range(count):
            yield infer(number % 30, asked_id=str(number))

    address = f"127.0.0.1:{gateway.running.gateway.grpc_port}"
    async with grpc.aio.insecure_channel(address) as channel, patience("the answers"):
        stream = stub_of(channel).ModelStreamInfer(ask(), metadata=KEY, compression=packed)
        found = [said async for said in stream]
        assert await stream.code() is grpc.StatusCode.OK
    assert [said.infer_response.id for said in found] == [str(number) for number in range(count)]
    assert [label(said) for said in found] == [int(number % 30 < 15) for number in range(count)]


def test_a_client_of_threads(gateway: GatewayThread) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{gateway.running.gateway.grpc_port}") as channel:
        asked = iter([infer(asked_id="a"), oip.ModelInferRequest(model_name="nobody", id="b"), infer(20.0)])
        said = list(stub_of(channel).ModelStreamInfer(asked, metadata=KEY, timeout=PATIENCE_S))
    assert [label(said[0]), label(said[2])] == [1, 0]
    assert "nobody" in said[1].error_message
    assert said[1].infer_response.id == "b"


async def test_large_messages_both_ways(gateway: GatewayThread) -> None:
    """Each larger than any window."""
    rows = (3 << 20) // 12

    def echo(request: PredictRequest) -> PredictReply:
        reply = answer_like_a_worker(request)
        reply.outputs.add(name="all", datatype=request.inputs[0].datatype, shape=request.inputs[0].shape)
        reply.outputs[-1].data = request.inputs[0].data
        return reply

    gateway.running.router.answer = echo
    asked = [infer(first, rows if first < 3 else 1, str(first)) for first in range(4)]
    address = f"127.0.0.1:{gateway.running.gateway.grpc_port}"
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel, patience("the answers"):
        said = [one async for one in stub_of(channel).ModelStreamInfer(iter(asked), metadata=KEY)]
    assert [one.infer_response.id for one in said] == ["0", "1", "2", "3"]
    for one, request in zip(said, asked, strict=True):
        assert one.infer_response.raw_output_contents[-1] == request.raw_input_contents[0]


async def test_a_cancelled_stream_is_taken_out_of_where_it_waits(gateway: GatewayThread) -> None:
    router = gateway.running.router
    router.answer = lambda _request: None
    asked, given_up = len(router.requests), len(router.cancelled)
    address = f"127.0.0.1:{gateway.running.gateway.grpc_port}"
    async with grpc.aio.insecure_channel(address) as channel:
        stream = stub_of(channel).ModelStreamInfer(metadata=KEY)
        for _ in range(3):
            await stream.write(infer())
        await eventually(lambda: len(router.requests) == asked + 3)
        stream.cancel()
        await eventually(lambda: len(router.cancelled) == given_up + 3)
        late = stub_of(channel).ModelStreamInfer(metadata=KEY, timeout=0.3)
        await late.write(infer())
        assert await late.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_who_does_not_read_is_not_read_from(gateway: GatewayThread) -> None:
    router = gateway.running.router
    wide = bytes(20_000)

    def widely(request: PredictRequest) -> PredictReply:
        reply = answer_like_a_worker(request)
        reply.outputs.add(name="wide", datatype=2, shape=[len(wide)], data=wide)
        return reply

    router.answer = widely
    began, count = len(router.requests), 3000
    address = f"127.0.0.1:{gateway.running.gateway.grpc_port}"
    # Or the client's library reads ahead what nobody has asked it for.
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(address, options=options) as channel, patience("the answers"):
        stream = stub_of(channel).ModelStreamInfer(metadata=KEY)
        written = 0

        async def write() -> None:
            nonlocal written
            for number in range(count):
                await stream.write(infer(number % 30))
                written += 1
            await stream.done_writing()

        writing = asyncio.create_task(write())
        await eventually(lambda: len(router.requests) >= began + 200)
        stuck = -1
        while stuck != len(router.requests):  # nothing more is taken for a while
            stuck = len(router.requests)
            await asyncio.sleep(0.2)
        assert stuck < began + 1000
        beside = await stub_of(channel).ModelInfer(infer(20.0), metadata=KEY)
        assert struct.unpack_from("<q", beside.raw_output_contents[0]) == (0,)
        said = [label(one) async for one in stream]
        await writing
    assert said == [int(number % 30 < 15) for number in range(count)]


async def test_a_stream_ends_with_the_gateway_once_what_it_asked_is_answered(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, drain_s=PATIENCE_S) as running:
        running.router.answer = lambda _request: None
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{running.gateway.grpc_port}")
        stream = stub_of(channel).ModelStreamInfer(metadata=KEY)
        await stream.write(infer(asked_id="held"))
        await eventually(lambda: running.router.requests)

        async def read() -> tuple[list[str], grpc.StatusCode]:
            found = [(await stream.read()).infer_response.id]
            return found, await stream.code()

        reading = asyncio.create_task(read())

        async def answer_later() -> None:
            await eventually(lambda: not running.gateway.health.ready)
            running.router.peers[-1].reply(answer_like_a_worker(running.router.requests[-1]))

        late = asyncio.create_task(answer_later())
    await late
    async with patience("its end"):
        assert await reading == (["held"], grpc.StatusCode.UNAVAILABLE)
    await channel.close(None)


def test_it_is_described(gateway: GatewayThread) -> None:
    method = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name["ModelStreamInfer"]
    assert method.client_streaming
    assert method.server_streaming
    fields = oip.ModelStreamInferResponse.DESCRIPTOR.fields_by_name
    assert {name: field.number for name, field in fields.items()} == {"error_message": 1, "infer_response": 2}
    with grpc.insecure_channel(f"127.0.0.1:{gateway.running.gateway.grpc_port}") as channel:
        refused = stub_of(channel).ModelStreamInfer(iter([infer()]), timeout=PATIENCE_S)
        until(lambda: refused.code() is grpc.StatusCode.UNAUTHENTICATED)
