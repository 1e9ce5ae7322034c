"""Large tensors over a frame connection: parts that are sent from where they are, and handlers that take them
as views."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, RequestFrame
from headrace.v1.tensor_pb2 import DataType, Tensor

from services.common.frames import FrameCalls, FrameServer, Limits, Peer
from services.common.frames.in_place import MOST_IN_PLACE
from services.common.frames.messages import MessageReader

TOKEN = "t" * 32
FP32 = DataType.DATA_TYPE_FP32
DATA = bytes(range(250)) * 2000


class Taker:
    """Answers every item with what it was given: the data apart, the data inside, the item as it came."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def on_request_frame(self, frame: RequestFrame) -> None:
        payloads = self._peer.item_payloads()
        for position, (item, payload) in enumerate(zip(frame.items, payloads, strict=True)):
            apart = self._peer.contents.get(position, [None] * len(item.inputs))
            tensors = [
                Tensor(name="apart" if view is not None else "inside", data=bytes(view or one.data))
                for one, view in zip(item.inputs, apart, strict=True)
            ]
            whole = PredictRequest.FromString(b"".join((*self._peer.apart, payload)))
            self._peer.reply(PredictReply(id=item.id, outputs=[*tensors, *whole.inputs], version=whole.model))

    def on_closed(self) -> None:
        pass


@pytest.mark.parametrize(
    ("window", "frame", "here"),
    [
        (65_535, 16_384, False),
        (65_535, 1 << 20, False),
        (16 << 20, 16_384, False),
        (16 << 20, 1 << 20, False),
        (65_535, 16_384, True),
    ],
)
async def test_parts_arrive_as_one_request_and_their_data_as_views(
    tmp_path: Path, window: int, frame: int, here: bool
) -> None:
    limits = Limits(window_bytes=window, max_http2_frame_bytes=frame, linger_s=0.1)
    server = FrameServer(Taker, credential=TOKEN, instance="s", role="worker", limits=limits, detaches=True)
    address = server.start_local("s") if here else await server.start_unix(tmp_path / "socket")
    calls = FrameCalls(address, credential=TOKEN, role="router", instance="c", limits=limits)
    calls.start()
    await calls.wait_connected(30)
    loop = asyncio.get_running_loop()
    given = PredictRequest(inputs=[Tensor(name="x", datatype=FP32, shape=[1, 125_000], data=DATA)])
    tensor = given.SerializeToString()
    assert tensor.endswith(DATA)
    parts = (tensor[: -len(DATA)], memoryview(tensor)[-len(DATA) :])
    small = PredictRequest(model="small", inputs=[Tensor(name="s", datatype=FP32, data=b"1234")])

    def submit(large: bool) -> asyncio.Future[PredictReply]:
        answer: asyncio.Future[PredictReply] = loop.create_future()
        if large:
            rest = PredictRequest(model="large").SerializeToString()
            calls.submit_raw(rest, loop.time() + 60, answer.set_result, parts)
        else:
            calls.submit(small, loop.time() + 60, answer.set_result)
        return answer

    try:
        replies = await asyncio.gather(*(submit(n % 3 != 0) for n in range(12)))
    finally:
        await calls.close()
        await server.close()
    for n, reply in enumerate(replies):
        if n % 3:
            assert reply.version == "large"
            assert [(one.name, one.data) for one in reply.outputs] == [("apart", DATA), ("x", DATA)]
        else:
            assert reply.version == "small"
            assert [(one.name, one.data) for one in reply.outputs] == [("inside", b"1234"), ("s", b"1234")]


@pytest.mark.parametrize("longest", [False, True])
def test_a_message_that_comes_byte_by_byte_is_no_object_for_each(longest: bool) -> None:
    data = DATA * (MOST_IN_PLACE // len(DATA) + 1) if longest else DATA
    reader = MessageReader(len(data))
    message = b"\0" + len(data).to_bytes(4, "big") + data
    got: list[bytes] = []
    for at in range(30_000):
        got += reader.feed(message[at : at + 1], 0, 1)
    assert len(reader._pieces) == longest
    assert reader.mid_message
    rest = message[30_000:] + b"\0\0\0\0\3abc\0\0\0\0\0"
    got += reader.feed(rest, 0, len(rest))
    assert got == [data, b"abc", b""]
    assert not reader.mid_message
