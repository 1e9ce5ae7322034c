"""The frame channel against itself and against the other gRPC implementations, both ways.

Every pair runs the same suite: a client that can send and read frames, a server that echoes.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import grpclib
import pytest
from google.protobuf.message import Message
from grpclib.client import Channel, StreamStreamMethod
from grpclib.const import Cardinality, Handler
from grpclib.server import Server as GrpclibServer
from headrace.v1.dataplane_pb2 import Hello, PredictReply, PredictRequest, ReplyFrame, RequestFrame
from headrace.v1.dataplane_pb2_grpc import DataPlaneServicer, DataPlaneStub, add_DataPlaneServicer_to_server
from headrace.v1.tensor_pb2 import Code, Tensor

from services.common.frames import FrameCalls, lost
from tests.fixtures.frames import PATH, TOKEN, Echoes, calling, serving, serving_at, serving_here
from tests.fixtures.waiting import PATIENCE_S, eventually, patience

ServicerContext = grpc.aio.ServicerContext[RequestFrame, ReplyFrame]
Exchange = Callable[[RequestFrame], Awaitable[ReplyFrame]]

register: Callable[[DataPlaneServicer, grpc.aio.Server], None] = add_DataPlaneServicer_to_server
stub: Callable[[grpc.aio.Channel], Any] = DataPlaneStub

# Servers that echo, each at an address.


@asynccontextmanager
async def own_server() -> AsyncIterator[str]:
    async with serving(Echoes()) as (_, address):
        yield address


@asynccontextmanager
async def own_path_server() -> AsyncIterator[str]:
    with TemporaryDirectory() as folder:
        async with serving_at(Path(folder) / "frames.sock", Echoes()) as (_, address):
            yield address


@asynccontextmanager
async def own_server_here() -> AsyncIterator[str]:
    async with serving_here(Echoes()) as (_, address):
        yield address


def echoed(frame: RequestFrame) -> ReplyFrame:
    return ReplyFrame(
        items=[PredictReply(id=item.id, version=item.version, outputs=item.inputs) for item in frame.items]
    )


class GrpcioEcho(DataPlaneServicer):
    async def Frames(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[RequestFrame], context: ServicerContext
    ) -> AsyncIterator[ReplyFrame]:
        if dict(context.invocation_metadata() or ()).get("authorization") != f"Bearer {TOKEN}":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
        async for frame in request_iterator:
            if frame.HasField("hello"):
                yield ReplyFrame(hello=Hello(protocol=1, role="worker", instance="grpcio"))
            if frame.items:
                yield echoed(frame)


@asynccontextmanager
async def grpcio_server() -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    register(GrpcioEcho(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def grpcio_path_server() -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    register(GrpcioEcho(), server)
    with TemporaryDirectory() as folder:
        server.add_insecure_port(f"unix:{folder}/frames.sock")
        await server.start()
        try:
            yield f"unix:{folder}/frames.sock"
        finally:
            await server.stop(None)


class GrpclibEcho:
    async def frames(self, stream) -> None:  # type: ignore[no-untyped-def]
        async for frame in stream:
            if frame.HasField("hello"):
                await stream.send_message(
                    ReplyFrame(hello=Hello(protocol=1, role="worker", instance="grpclib"))
                )
            if frame.items:
                await stream.send_message(echoed(frame))

    def __mapping__(self) -> dict[str, Handler]:
        return {PATH: Handler(self.frames, Cardinality.STREAM_STREAM, RequestFrame, ReplyFrame)}


@asynccontextmanager
async def grpclib_server() -> AsyncIterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = GrpclibServer([GrpclibEcho()])
    await server.start("127.0.0.1", port)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def grpclib_path_server() -> AsyncIterator[str]:
    server = GrpclibServer([GrpclibEcho()])
    with TemporaryDirectory() as folder:
        await server.start(path=f"{folder}/frames.sock")
        try:
            yield f"unix:{folder}/frames.sock"
        finally:
            server.close()
            await server.wait_closed()


# Clients, each an exchange of one frame for the frames that answer all its items.


@asynccontextmanager
async def own_client(address: str) -> AsyncIterator[Exchange]:
    async with calling(address) as calls:

        async def exchange(frame: RequestFrame) -> ReplyFrame:
            deadline = asyncio.get_running_loop().time() + 20
            ids = [item.id for item in frame.items]
            replies = await asyncio.gather(*(calls.predict(item, deadline) for item in frame.items))
            for item_id, reply in zip(ids, replies, strict=True):
                reply.id = item_id
            return ReplyFrame(items=replies)

        yield exchange


async def collect(frame: RequestFrame, read: Callable[[], Awaitable[Message | None]]) -> ReplyFrame:
    replies: dict[int, PredictReply] = {}
    async with patience("a reply to every item"):
        while len(replies) < len(frame.items):
            got = await read()
            assert isinstance(got, ReplyFrame)
            replies.update({item.id: item for item in got.items})
    return ReplyFrame(items=[replies[item.id] for item in frame.items])


@asynccontextmanager
async def grpcio_client(address: str) -> AsyncIterator[Exchange]:
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = stub(channel).Frames(metadata=(("authorization", f"Bearer {TOKEN}"),))
        await call.write(RequestFrame(hello=Hello(protocol=1, role="gateway", instance="grpcio")))
        assert (await call.read()).hello.protocol == 1

        async def exchange(frame: RequestFrame) -> ReplyFrame:
            await call.write(frame)
            return await collect(frame, call.read)

        yield exchange
        await call.done_writing()
        assert not isinstance(await call.read(), ReplyFrame)
        assert await call.code() is grpc.StatusCode.OK


@asynccontextmanager
async def grpclib_client(address: str) -> AsyncIterator[Exchange]:
    kind, _, rest = address.rpartition(":")
    async with Channel(path=rest) if kind == "unix" else Channel(kind, int(rest)) as channel:
        method = StreamStreamMethod(channel, PATH, RequestFrame, ReplyFrame)
        async with method.open(metadata={"authorization": f"Bearer {TOKEN}"}) as stream:
            await stream.send_message(
                RequestFrame(hello=Hello(protocol=1, role="gateway", instance="grpclib"))
            )
            first = await stream.recv_message()
            assert first is not None
            assert first.hello.protocol == 1

            async def exchange(frame: RequestFrame) -> ReplyFrame:
                await stream.send_message(frame)
                return await collect(frame, stream.recv_message)

            yield exchange
            await stream.end()
            assert await stream.recv_message() is None


PAIRS = [
    pytest.param(server, client, id=f"{client.__name__}-{server.__name__}")
    for server, client in (
        (own_server, own_client),
        (own_server, grpcio_client),
        (own_server, grpclib_client),
        (grpcio_server, own_client),
        (grpclib_server, own_client),
        (own_server_here, own_client),
        (own_path_server, own_client),
        (own_path_server, grpcio_client),
        (own_path_server, grpclib_client),
        (grpcio_path_server, own_client),
        (grpclib_path_server, own_client),
    )
]


Server = Callable[[], AbstractAsyncContextManager[str]]
Client = Callable[[str], AbstractAsyncContextManager[Exchange]]


@pytest.mark.parametrize(("server", "client"), PAIRS)
class TestEveryPair:
    async def test_answers_each_item_with_its_own(self, server: Server, client: Client) -> None:
        async with server() as address, client(address) as exchange:
            frame = RequestFrame(items=[PredictRequest(id=n, version=f"v{n}") for n in range(1, 500)])
            reply = await exchange(frame)
            assert [item.version for item in reply.items] == [f"v{n}" for n in range(1, 500)]

    async def test_many_small_frames_in_turn(self, server: Server, client: Client) -> None:
        async with server() as address, client(address) as exchange:
            for n in range(1, 100):
                frame = RequestFrame(items=[PredictRequest(id=n, version=str(n))])
                assert (await exchange(frame)).items[0].version == str(n)

    async def test_messages_larger_than_frames_and_windows(self, server: Server, client: Client) -> None:
        data = bytes(range(256)) * 4 * 4096  # 4 MiB
        async with server() as address, client(address) as exchange:
            for n in range(1, 7):
                item = PredictRequest(id=n, inputs=[Tensor(name="x", data=data)])
                reply = await exchange(RequestFrame(items=[item]))
                assert reply.items[0].outputs[0].data == data

    async def test_both_directions_full_at_once(self, server: Server, client: Client) -> None:
        data = b"t" * 300_000
        async with server() as address, client(address) as exchange:
            frames = [
                RequestFrame(items=[PredictRequest(id=n, version=str(n), inputs=[Tensor(data=data)])])
                for n in range(1, 9)
            ]
            for frame in frames:
                reply = await exchange(frame)
                assert reply.items[0].outputs[0].data == data


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def grpclib_first_message(method: StreamStreamMethod[RequestFrame, ReplyFrame]) -> None:
    async with method.open(metadata={"authorization": "Bearer wrong"}) as stream:
        await stream.send_request()
        await stream.recv_message()


class TestStatus:
    async def test_grpcio_sees_the_wrong_credential(self) -> None:
        async with own_server() as address, grpc.aio.insecure_channel(address) as channel:
            call = stub(channel).Frames(metadata=metadata("wrong"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    async def test_grpcio_sees_the_wrong_version(self) -> None:
        async with own_server() as address, grpc.aio.insecure_channel(address) as channel:
            call = stub(channel).Frames(metadata=metadata(TOKEN))
            await call.write(RequestFrame(hello=Hello(protocol=99)))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "protocol 99" in str(caught.value.details())

    async def test_grpcio_sees_an_unknown_method(self) -> None:
        async with own_server() as address, grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(channel).Predict(PredictRequest(), metadata=metadata(TOKEN), timeout=PATIENCE_S)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_grpclib_sees_the_wrong_credential(self) -> None:
        async with own_server() as address:
            host, _, port = address.rpartition(":")
            async with Channel(host, int(port)) as channel:
                method = StreamStreamMethod(channel, PATH, RequestFrame, ReplyFrame)
                with pytest.raises(grpclib.GRPCError) as caught:
                    await grpclib_first_message(method)
                assert caught.value.status is grpclib.Status.UNAUTHENTICATED

    async def test_a_compressing_grpcio_client_is_refused(self) -> None:
        async with own_server() as address, grpc.aio.insecure_channel(address) as channel:
            call = stub(channel).Frames(metadata=metadata(TOKEN), compression=grpc.Compression.Gzip)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_our_client_hears_why_grpcio_refused(self) -> None:
        async with grpcio_server() as address, calling(address, connect=False, credential="wrong") as calls:
            await eventually(lambda: "UNAUTHENTICATED" in calls.last_error)
            assert not calls.connected

    async def test_our_client_survives_a_restart_of_a_grpcio_server(self) -> None:
        server = grpc.aio.server()
        register(GrpcioEcho(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with calling(f"127.0.0.1:{port}") as calls:
            assert (await calls.predict(PredictRequest(version="1"), None)).version == "1"
            await server.stop(None)
            await eventually(lambda: not calls.connected)
            assert lost(await calls.predict(PredictRequest(version="1"), None))
            again = grpc.aio.server()
            register(GrpcioEcho(), again)
            again.add_insecure_port(f"127.0.0.1:{port}")
            await again.start()
            await calls.wait_connected(PATIENCE_S)
            assert (await calls.predict(PredictRequest(version="2"), None)).version == "2"
        await again.stop(None)


class TestOwnClientKeepsToTheHello:
    async def test_refuses_beyond_the_servers_max_in_flight(self) -> None:
        class OneAtATime(GrpcioEcho):
            async def Frames(  # noqa: N802 - gRPC's name
                self, request_iterator: AsyncIterator[RequestFrame], context: ServicerContext
            ) -> AsyncIterator[ReplyFrame]:
                await anext(request_iterator)
                yield ReplyFrame(hello=Hello(protocol=1, max_in_flight=1))
                async for frame in request_iterator:
                    yield echoed(frame)

        server = grpc.aio.server()
        register(OneAtATime(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with calling(f"127.0.0.1:{port}") as calls:
            both = await asyncio.gather(*(answer(calls) for _ in range(2)))
            assert sorted(reply.code for reply in both) == [Code.CODE_OK, Code.CODE_RESOURCE_EXHAUSTED]
        await server.stop(None)


async def answer(calls: FrameCalls) -> PredictReply:
    return await calls.predict(PredictRequest(), None)
