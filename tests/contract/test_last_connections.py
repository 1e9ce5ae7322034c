"""Connections that the kernel has accepted when their listener closes: gRPC's clients and frame streams.

In each test the event loop stands still between the client's `connect` and the end of the server, so that the
connection waits in the listener's queue, which the kernel resets with it."""

from __future__ import annotations

import asyncio
import select
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from ssl import SSLContext

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.v1.dataplane_pb2 import ReplyFrame

from services.common import listening
from services.common.frames import FrameServer, client_tls, server_tls
from services.common.frames.address import PathListener
from services.common.frames.wire import ErrorCode, frame, settings
from services.gateway.rpc.limits import RpcLimits
from tests.fixtures.certificates import certify
from tests.fixtures.frames import LOOPS, PREFACE, QUICK, TOKEN, Echoes, Wire, run_on
from tests.fixtures.rpc import CheckCall, Front, health_methods
from tests.fixtures.waiting import PATIENCE_S, patience

NewLoop = Callable[[], asyncio.AbstractEventLoop]
CHANNELS = 32


def heard(client: socket.socket) -> bytes:
    """All that comes until the other end hangs up; then this one does. Raises ConnectionResetError."""
    said = b""
    with client:
        while piece := client.recv(65536):
            said += piece
    return said


@pytest.mark.parametrize("new_loop", LOOPS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_call_on_the_last_connection_is_answered(new_loop: NewLoop, shared: bool) -> None:
    async def scenario() -> None:
        server = Front(methods=await health_methods()).server
        port = await server.start("127.0.0.1", 0, reuse_port=shared)
        call = CheckCall()
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            client.sendall(call.asks)
            said = asyncio.get_running_loop().run_in_executor(None, heard, client)
            await server.stop(PATIENCE_S)
            call.heard(await said)
        assert call.outcome == "answered"
        assert call.sent_away
        assert not server.connections

    run_on(new_loop, scenario())


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_last_connection_without_a_call_is_told_and_not_waited_for(new_loop: NewLoop) -> None:
    async def scenario() -> None:
        server = Front().server
        port = await server.start("127.0.0.1", 0)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            said = asyncio.get_running_loop().run_in_executor(None, heard, client)
            async with patience("the end", 30):
                await server.stop(PATIENCE_S)
            call = CheckCall()
            call.heard(await said)
        assert call.outcome == "sent on"

    run_on(new_loop, scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux spreads connections over those who listen")
async def test_grpc_s_own_client_is_answered_by_either_of_two_that_listen() -> None:
    methods = await health_methods()
    patient = RpcLimits(drain_notice_s=PATIENCE_S)  # channels close when they have their answer
    ends, stays = (Front(patient, methods).server for _ in range(2))
    port = await ends.start("127.0.0.1", 0, reuse_port=True)
    await stays.start("127.0.0.1", port, reuse_port=True)
    assert ends._server is not None
    listener = ends._server.sockets[0].fileno()

    def ask() -> int:
        # A connection of its own, or all would share one; and what goes wrong is told.
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            return int(reply.status)

    with ThreadPoolExecutor(CHANNELS) as threads:
        asked = [asyncio.wrap_future(threads.submit(ask)) for _ in range(CHANNELS)]
        assert select.select([listener], [], [], PATIENCE_S)[0]
        await ends.stop(PATIENCE_S)
        assert set(await asyncio.gather(*asked)) == {health_pb2.HealthCheckResponse.SERVING}
    await stays.stop(PATIENCE_S)


def frame_server(tls: SSLContext | None = None) -> FrameServer:
    return FrameServer(Echoes(), credential=TOKEN, instance="server-1", role="worker", limits=QUICK, ssl=tls)


def opening() -> bytes:
    return PREFACE + settings({}) + frame(1, 4, 1, Wire.request_headers()) + frame(0, 0, 1, Wire.hello())


def frames_in(said: bytes) -> list[tuple[int, bytes]]:
    """Kind and payload of each."""
    found = []
    while said:
        end = 9 + int.from_bytes(said[:3], "big")
        assert len(said) >= end
        found.append((said[3], said[9:end]))
        said = said[end:]
    return found


def said_good_bye(said: bytes) -> bool:
    """Before the hello or behind it: its client has asked nothing yet, hears that it should ask elsewhere,
    and that nothing is wrong."""
    frames = frames_in(said)
    hellos = [ReplyFrame.FromString(payload[5:]) for kind, payload in frames if kind == 0]
    kind, payload = frames[-1]
    assert (frames[0][0], kind) == (4, 7), "SETTINGS come first, GOAWAY last"
    return ErrorCode(payload[7]) is ErrorCode.NO_ERROR and all(hello.draining for hello in hellos)


@pytest.mark.parametrize("new_loop", LOOPS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_last_stream_hears_that_the_server_goes_away(new_loop: NewLoop, shared: bool) -> None:
    async def scenario() -> None:
        server = frame_server()
        port = await server.start("127.0.0.1", 0, reuse_port=shared)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            client.sendall(opening())
            said = asyncio.get_running_loop().run_in_executor(None, heard, client)
            await server.drain(PATIENCE_S)
            assert said_good_bye(await said)
        assert not server.connections

    run_on(new_loop, scenario())


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_last_stream_at_a_path_hears_it_too(new_loop: NewLoop, tmp_path: Path) -> None:
    async def scenario() -> None:
        server, path = frame_server(), tmp_path / "s"
        await server.start_unix(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE_S)
            client.connect(str(path))
            client.sendall(opening())
            said = asyncio.get_running_loop().run_in_executor(None, heard, client)
            await server.drain(PATIENCE_S)
            assert said_good_bye(await said)
        assert not path.exists()

    run_on(new_loop, scenario())


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_last_stream_hears_it_by_tls(new_loop: NewLoop, tmp_path: Path) -> None:
    certificate, key = certify(tmp_path)

    def ask(plain: socket.socket) -> bytes:
        with client_tls(certificate).wrap_socket(plain, server_hostname="127.0.0.1") as client:
            client.sendall(opening())
            return heard(client)

    async def scenario() -> None:
        server = frame_server(server_tls(certificate, key))
        port = await server.start("127.0.0.1", 0)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            said = asyncio.get_running_loop().run_in_executor(None, ask, client)
            await server.drain(PATIENCE_S)
            assert said_good_bye(await said)

    run_on(new_loop, scenario())


@pytest.mark.parametrize("new_loop", LOOPS)
def test_who_never_agrees_upon_tls_is_not_waited_for(
    new_loop: NewLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_TLS_S", 0.05)

    async def scenario() -> None:
        server = frame_server(server_tls(*certify(tmp_path)))
        port = await server.start("127.0.0.1", 0)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as silent:
            async with patience("the end", 30):  # by itself a handshake has a minute
                await server.drain(PATIENCE_S)
            assert heard(silent) == b""

    run_on(new_loop, scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux refuses connections to a socket that listens")
def test_nobody_gets_in_at_a_path_once_its_last_were_taken(tmp_path: Path) -> None:
    at = PathListener(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as before, socket.socket(socket.AF_UNIX) as late, at.socket:
        before.connect(str(at.path))
        (taken,) = listening.accept_last(at.socket, shared=False)
        with pytest.raises(ConnectionRefusedError):
            late.connect(str(at.path))
        taken.sendall(b"heard")
        taken.close()
        assert heard(before) == b"heard"
