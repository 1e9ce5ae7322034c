"""Long messages over a frame connection, however the stream is split: each arrives once, as it was sent,
whether it is read in place or in pieces."""

from __future__ import annotations

import asyncio

from headrace.v1.dataplane_pb2 import Hello, PredictRequest, RequestFrame
from headrace.v1.tensor_pb2 import Tensor
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.common.frames import FrameCalls, FrameServer, Limits, Peer, wire
from services.common.frames.client_connection import ClientConnection, Opening
from services.common.frames.in_place import IN_PLACE_BYTES, InPlace, unwritten
from services.common.frames.server_connection import ServerConnection
from tests.fixtures.frames import TOKEN
from tests.fixtures.mutations import nothing_internal, pieces
from tests.fixtures.wires import Cable

LIMITS = Limits(max_message_bytes=1 << 21)
LONG = IN_PLACE_BYTES
#: Of the data of each request: nothing long, at the borders, in one HTTP/2 frame, in several.
SIZES = st.one_of(
    st.integers(0, 100),
    st.integers(LONG - 100, LONG + 100),
    st.integers(LONG, 5 * LONG),
    st.integers((1 << 18) - 200, (1 << 18) + 200),
    st.integers(2 << 18, 3 << 18),
)
FRAMES = st.sampled_from([16_384, 70_000, 1 << 18])
SPLITS = st.lists(st.one_of(st.integers(1, 200), st.integers(1, 1 << 18)), max_size=12)


class Collects:
    def __init__(self) -> None:
        self.got: list[bytes] = []

    def __call__(self, _peer: Peer) -> Collects:
        return self

    def on_request_frame(self, frame: RequestFrame) -> None:
        self.got += [item.inputs[0].data for item in frame.items]

    def on_closed(self) -> None:
        pass


def opened(collects: Collects) -> tuple[ServerConnection, Cable]:
    server = FrameServer(collects, credential=TOKEN, instance="s", role="worker", limits=LIMITS)
    connection, cable = ServerConnection(server, asyncio.get_running_loop()), Cable()
    connection.connection_made(cable)
    return connection, cable


def greeting() -> bytes:
    """What a client says first."""
    calls = FrameCalls("h:1", credential=TOKEN, role="router", instance="c", limits=LIMITS)
    hello = Hello(protocol=1, role="router", instance="c")
    client = ClientConnection(calls, Opening("h:1", "http", TOKEN, hello, 2.0), asyncio.get_running_loop())
    cable = Cable()
    client.connection_made(cable)
    client.connection_lost(None)
    return cable.take()


def stream(contents: list[bytes], frame_bytes: int, *, end: bool = False) -> bytes:
    """Each in a message of its own, over as many DATA frames as it needs, and a PING behind it."""
    out = bytearray()
    for number, data in enumerate(contents, 1):
        item = PredictRequest(id=number, model="m", inputs=[Tensor(name="x", data=data)])
        payload = RequestFrame(items=[item]).SerializeToString()
        message = b"\0" + len(payload).to_bytes(4, "big") + payload
        for at in range(0, len(message), frame_bytes):
            last = end and number == len(contents) and at + frame_bytes >= len(message)
            flags = wire.END_STREAM if last else 0
            out += wire.frame(wire.DATA, flags, 1, message[at : at + frame_bytes])
        out += wire.frame(wire.PING, 0, 0, b"%08d" % number)
    return bytes(out)


@given(st.lists(SIZES, max_size=5), FRAMES, SPLITS)
@example([3 * LONG, 3 * LONG, 10, 3 * LONG], 1 << 18, [1])
@settings(max_examples=60, deadline=None)
def test_messages_are_the_same_however_they_are_split(
    sizes: list[int], frame_bytes: int, splits: list[int]
) -> None:
    async def play() -> None:
        collects = Collects()
        connection, cable = opened(collects)
        contents = [(b"%07d" % number * (size // 7 + 1))[:size] for number, size in enumerate(sizes)]
        for piece in pieces(greeting() + stream(contents, frame_bytes, end=True), splits):
            cable.deliver(piece, connection)
        assert collects.got == contents
        answered = cable.take()
        assert [answered.count(b"%08d" % number) for number in range(1, len(sizes) + 1)] == [1] * len(sizes)
        connection.connection_lost(None)

    asyncio.run(play())


@given(st.integers(LONG, 4 * LONG), st.integers(0, 1 << 20), st.integers(0, 255), SPLITS)
@settings(max_examples=60, deadline=None)
def test_a_stream_with_a_byte_out_of_place_harms_only_itself(
    size: int, where: int, byte: int, splits: list[int]
) -> None:
    async def play() -> None:
        collects = Collects()
        connection, cable = opened(collects)
        begin = greeting()
        said = bytearray(stream([b"a" * size, b"b" * size], 1 << 18))
        said[where % len(said)] = byte
        with nothing_internal("services.common.frames"):
            for piece in pieces(begin + bytes(said), splits):
                cable.deliver(piece, connection)
        assert len(collects.got) <= 2
        connection.connection_lost(None)
        for piece in pieces(bytes(said), splits):  # what a dead connection is given leads nowhere
            cable.deliver(piece, connection)
        assert len(collects.got) <= 2

    asyncio.run(play())


def test_long_messages_one_after_the_other_are_read_in_place_and_a_short_one_ends_it() -> None:
    async def play() -> None:
        collects = Collects()
        connection, cable = opened(collects)
        cable.deliver(greeting(), connection)
        long, begun = b"x" * (4 * LONG), 2 * LONG
        first = stream([long, long], 1 << 20)
        cable.deliver(first[:begun], connection)
        assert isinstance(cable.get_protocol(), InPlace)
        cable.deliver(first[begun:], connection)
        assert collects.got == [long, long]
        assert cable.get_protocol() is connection  # after the PING
        assert cable.switches == 2
        connection.connection_lost(None)

    asyncio.run(play())


def test_a_long_message_is_the_bytes_that_were_filled() -> None:
    made, view = unwritten(LONG)
    view[:] = b"y" * LONG
    assert type(made) is bytes
    assert made == b"y" * LONG
    assert hash(made) == hash(b"y" * LONG)
