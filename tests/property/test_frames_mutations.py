"""One byte out of place, anywhere in a frame connection, in either direction, however it is split: the
connection goes on or ends, nothing escapes it, and everybody who waits hears of it once."""

from __future__ import annotations

import asyncio

from headrace.v1.dataplane_pb2 import Hello, PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Tensor
from hypothesis import given, settings

from services.common.frames import FrameCalls, FrameServer
from services.common.frames.client_connection import ClientConnection, Opening
from services.common.frames.server_connection import ServerConnection
from tests.fixtures.frames import QUICK, TOKEN, Echoes
from tests.fixtures.mutations import MUTATIONS, SPLITS, Mutation, mutated, nothing_internal, pieces
from tests.fixtures.wires import Cable

REQUESTS = 5
#: More than a whole conversation, less than anything that runs away.
MOST_BYTES = 1 << 20
OPENING = Opening("h:1", "http", TOKEN, Hello(protocol=1, role="router", instance="c"), QUICK.ping_after_s)


class Client:
    def __init__(self) -> None:
        self.calls = FrameCalls("h:1", credential=TOKEN, role="router", instance="c", limits=QUICK)
        self.connection = ClientConnection(self.calls, OPENING, asyncio.get_running_loop())
        self.cable = Cable(MOST_BYTES)
        self.connection.connection_made(self.cable)
        self.replies: dict[int, list[PredictReply]] = {}

    def ask(self) -> None:
        for number in range(REQUESTS):
            got = self.replies.setdefault(number, [])
            tensor = Tensor(name="x", shape=[1], data=bytes([number]) * 20)
            self.calls.submit(PredictRequest(model="m", inputs=[tensor]), None, got.append)


class Server:
    def __init__(self) -> None:
        self.echoes = Echoes()
        self.server = FrameServer(self.echoes, credential=TOKEN, instance="s", role="worker", limits=QUICK)
        self.connection = ServerConnection(self.server, asyncio.get_running_loop())
        self.cable = Cable(MOST_BYTES)
        self.connection.connection_made(self.cable)


async def conversation() -> tuple[bytes, bytes]:
    """What client and server say to each other where nobody is at fault."""
    client, server = Client(), Server()
    said: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    for turn in range(8):
        if turn == 3:
            client.ask()
        await asyncio.sleep(0)
        asked = client.cable.take()
        if asked:
            server.connection.data_received(asked)
        answered = server.cable.take()
        if answered:
            client.connection.data_received(answered)
        said[0].extend(asked)
        said[1].extend(answered)
    assert all(len(got) == 1 for got in client.replies.values())
    client.connection.connection_lost(None)
    server.connection.connection_lost(None)
    return bytes(said[0]), bytes(said[1])


FROM_CLIENT, FROM_SERVER = asyncio.run(conversation())


@given(MUTATIONS, SPLITS)
@settings(max_examples=200, deadline=None)
def test_a_server_survives_its_client(mutation: Mutation, splits: list[int]) -> None:
    async def play() -> None:
        server = Server()
        for piece in pieces(mutated(FROM_CLIENT, mutation), splits):
            server.connection.data_received(piece)
            await asyncio.sleep(0)
        server.connection.connection_lost(None)
        assert server.server.connections == 0
        assert [echo.closed for echo in server.echoes.made] == [1] * len(server.echoes.made)
        assert len(server.echoes.made) <= 1

    with nothing_internal("services.common.frames"):
        asyncio.run(play())


@given(MUTATIONS, SPLITS)
@settings(max_examples=200, deadline=None)
def test_a_client_survives_its_server(mutation: Mutation, splits: list[int]) -> None:
    async def play() -> None:
        client = Client()
        for piece in pieces(mutated(FROM_SERVER, mutation), splits):
            client.connection.data_received(piece)
            if client.calls.usable and not client.replies:
                client.ask()
            await asyncio.sleep(0)
        client.connection.connection_lost(None)
        assert all(len(got) == 1 for got in client.replies.values())
        assert client.calls.in_flight == 0
        await client.calls.close()

    with nothing_internal("services.common.frames"):
        asyncio.run(play())
