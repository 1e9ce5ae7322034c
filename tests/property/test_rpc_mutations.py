"""One byte out of place, anywhere in what a gRPC client says, however it is split: the connection goes on or
ends, nothing escapes it, and nothing of it stays."""

from __future__ import annotations

import asyncio
import gzip

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.rpc.limits import RpcLimits
from tests.fixtures.mutations import MUTATIONS, SPLITS, Mutation, mutated, nothing_internal, pieces
from tests.fixtures.rpc import STREAM_INFER, Front, infer, prefixed

LIMITS = RpcLimits(
    max_streams=8, stream_window_bytes=1 << 16, window_bytes=1 << 17, max_connections=4, max_stream_requests=1
)


async def words() -> bytes:
    """What a client says where nobody is at fault."""
    front = Front(LIMITS)
    client = front.client(window=200)
    said = bytearray()

    async def say() -> None:
        data = client.h2.data_to_send()
        said.extend(data)
        client.connection.data_received(data)
        await client.turn(2)

    client.ask()
    await say()
    client.ask(infer(20.0, id="again"))
    client.ask(gzip.compress(infer()), 1, grpc_encoding="gzip")
    await say()
    in_pieces = client.head(grpc_timeout="5S")
    body = prefixed(infer())
    client.send(in_pieces, body[:20], end=False)
    await say()
    client.send(in_pieces, body[20:])
    client.h2.ping(b"12345678")
    await say()
    given_up = client.ask()
    client.h2.reset_stream(given_up)
    client.h2.increment_flow_control_window(1000)
    await say()
    stream = client.head(STREAM_INFER)
    client.send(stream, prefixed(infer()) + prefixed(infer(20.0, id="again"))[:40], end=False)
    await say()
    client.send(stream, prefixed(infer(20.0, id="again"))[40:])
    await say()
    return bytes(said)


WORDS = asyncio.run(words())


@given(MUTATIONS, SPLITS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_front_survives_its_client(mutation: Mutation, splits: list[int], answered: bool) -> None:
    async def play() -> None:
        front = Front(LIMITS)
        client = front.client()
        for piece in pieces(mutated(WORDS, mutation), splits):
            client.connection.data_received(piece)
            await asyncio.sleep(0)
            if answered:
                front.router.answer_all()
        client.tick(3)
        await asyncio.sleep(0)
        client.connection.connection_lost(None)
        assert not front.router.waiting
        assert front.server.connections == 0
        assert client.connection.streams == 0
        assert front.service.bodies.held == 0
        assert front.server.streams.open == 0
        front.service.close()

    with nothing_internal("services.gateway"):
        asyncio.run(play())
