"""Long messages over gRPC, whatever the lengths of frames and reads: each call is answered for what it asked,
and what a call that has ended still sends belongs to no other."""

from __future__ import annotations

import asyncio
import struct

from headrace.v1.tensor_pb2 import Code
from hypothesis import given, settings
from hypothesis import strategies as st
from open_inference.open_inference_pb2 import ModelInferResponse

from tests.fixtures.mutations import nothing_internal, pieces
from tests.fixtures.rpc import Answer, Client, Front, infer, prefixed
from tests.fixtures.waiting import eventually

#: The tag of a field that no message has, of bytes: parsers pass over it.
_UNKNOWN = b"\xa2\x06"
_SIZES = st.sampled_from([3_000, 60_000, 65_500, 70_000, 200_000])
_FRAMES = st.lists(st.integers(1, 1 << 14), max_size=6)
#: Again and again.
_READS = st.lists(st.integers(1, 40_000), min_size=1, max_size=5)


def long(first: float, size: int) -> bytes:
    """A good message with `size` bytes more than it needs."""
    varint = bytes((size & 127 | 128, size >> 7 & 127 | 128, size >> 14))
    return infer(first) + _UNKNOWN + varint + bytes(size)


def label(answer: Answer) -> int:
    assert answer.trailers["grpc-status"] == "0"
    said = ModelInferResponse.FromString(answer.message)
    return int(struct.unpack("<q", said.raw_output_contents[0])[0])


def in_frames(client: Client, stream: int, content: bytes, sizes: list[int]) -> None:
    """All of a call's content, in frames of these sizes and then as long as may be."""
    at = 0
    for size in sizes + [1 << 14] * (len(content) >> 14):
        if at + size < len(content):
            client.send(stream, content[at : at + size], end=False)
            at += size
    client.send(stream, content[at:])


@given(_SIZES, _FRAMES, _READS)
@settings(max_examples=60, deadline=None)
def test_a_long_message_is_what_was_sent(size: int, frames: list[int], reads: list[int]) -> None:
    async def play() -> None:
        front = Front()
        client = front.client()
        await client.turn()
        streams = [client.head(), client.head(), client.head()]
        in_frames(client, streams[0], prefixed(long(20.0, size)), frames)
        client.send(streams[1], prefixed(infer(1.0)))
        in_frames(client, streams[2], prefixed(long(30.0, size)), frames)
        for piece in pieces(client.h2.data_to_send(), reads * 50):
            client.connection.data_received(piece)
            await asyncio.sleep(0)
        await eventually(lambda: len(front.router.waiting) == client.connection.streams)  # or refused
        front.router.answer_all()
        await client.turn()
        assert [label(client.answers[stream]) for stream in streams] == [0, 1, 0]
        assert front.service.bodies.held == 0
        front.service.close()

    with nothing_internal("services.gateway"):
        asyncio.run(play())


@given(st.integers(1, 120_000), _FRAMES)
@settings(max_examples=30, deadline=None)
def test_the_rest_of_a_call_that_came_too_late_is_nobodys(cut: int, frames: list[int]) -> None:
    async def play() -> None:
        front = Front()
        client = front.client()
        await client.turn()
        late = client.head()
        await client.turn()
        in_frames(client, late, prefixed(long(20.0, 130_000)), frames)
        said = client.h2.data_to_send()
        client.connection.data_received(said[:cut])
        client.tick(31)
        client.connection.data_received(said[cut:])
        again = client.ask(infer(1.0))
        await client.turn()
        front.router.answer_all()
        await client.turn()
        assert client.answers[late].status == Code.CODE_DEADLINE_EXCEEDED
        assert label(client.answers[again]) == 1
        assert front.service.bodies.held == 0
        client.connection.connection_lost(None)
        front.service.close()

    with nothing_internal("services.gateway"):
        asyncio.run(play())
