"""Who watches the health of a server of grpcio: each for himself, whatever the others do."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hpack import Encoder

from services.common.frames import wire
from services.common.grpc_serving import serve_grpc
from tests.fixtures.waiting import PATIENCE_S, patience

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE = "headrace.v1.DataPlane"
_ASKED = health_pb2.HealthCheckRequest(service=_SERVICE)
_HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/grpc.health.v1.Health/Watch"),
    (":authority", "localhost"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


async def test_who_watches_hears_of_the_end_though_another_watcher_has_left() -> None:
    async with patience("the end to be told"):
        serving = serve_grpc(
            _SERVICE, lambda _server: None, ("127.0.0.1", 0), "0123456789abcdef", drain_s=PATIENCE_S
        )
        port = await serving.__aenter__()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        health = health_pb2_grpc.HealthStub(channel)
        leaves, stays = health.Watch(_ASKED), health.Watch(_ASKED)
        for watch in (leaves, stays):
            assert (await watch.read()).status == _SERVING
        leaves.cancel()
        await health.Check(_ASKED)  # the server has read of it by then

        async def last() -> int:
            status = (await stays.read()).status
            stays.cancel()  # the end of the server waits for it
            return int(status)

        heard = asyncio.create_task(last())
        await serving.__aexit__(None, None, None)
        assert await heard == _NOT_SERVING
        await channel.close(None)


async def test_who_watches_and_takes_no_message_holds_up_neither_others_nor_the_end() -> None:
    async with patience("the server to end"):
        async with serve_grpc(
            _SERVICE, lambda _server: None, ("127.0.0.1", 0), "0123456789abcdef", drain_s=0.1
        ) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            asked = _ASKED.SerializeToString()
            writer.write(
                wire.PREFACE
                + wire.settings({wire.INITIAL_WINDOW_SIZE: 0})
                + wire.header_block(1, Encoder().encode(_HEADERS, huffman=False), 16_384, end_stream=False)
                + wire.frame(wire.DATA, wire.END_STREAM, 1, b"\0" + len(asked).to_bytes(4, "big") + asked)
            )
            said = b""
            while b"application/grpc" not in said:  # its headers are no message
                said += await reader.read(65_536)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(_ASKED)
                assert (await watch.read()).status == _SERVING
                watch.cancel()
        writer.close()
