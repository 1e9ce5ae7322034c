"""Items per second of the frame channel against a bare loop, in one process and one run, alternating.

The bare loop is length-prefixed protobuf frames over TCP without flow control, bounds, deadlines, statuses
or reconnects: the least a Python process can do. `python -m benchmarks.frames [--seconds 2]`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvloop
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, ReplyFrame, RequestFrame
from headrace.v1.tensor_pb2 import DataType, Tensor

from services.common.frames import FrameCalls, FrameServer, Peer

Submit = Callable[[PredictRequest, Callable[[PredictReply], None]], None]


class Bare(asyncio.Protocol):
    """Either end of the bare loop."""

    def __init__(
        self, wrap: Callable[..., RequestFrame | ReplyFrame], take: Callable[[Bare, bytes], None]
    ) -> None:
        self.wrap = wrap
        self.take = take
        self.unparsed = bytearray()
        self.queued: list[PredictRequest | PredictReply] = []
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        buffer = self.unparsed
        buffer += data
        while len(buffer) >= 4:
            size = int.from_bytes(buffer[:4], "little")
            if len(buffer) < 4 + size:
                break
            body = bytes(buffer[4 : 4 + size])
            del buffer[: 4 + size]
            self.take(self, body)

    def push(self, item: PredictRequest | PredictReply) -> None:
        self.queued.append(item)
        if len(self.queued) == 1:
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        body = self.wrap(items=self.queued).SerializeToString()
        self.queued = []
        self.transport.write(len(body).to_bytes(4, "little") + body)


@asynccontextmanager
async def bare() -> AsyncIterator[Submit]:
    loop = asyncio.get_running_loop()
    waiting: dict[int, Callable[[PredictReply], None]] = {}

    def serve(end: Bare, body: bytes) -> None:
        for item in RequestFrame.FromString(body).items:
            end.push(PredictReply(id=item.id, version="1", outputs=item.inputs))

    def answer(_: Bare, body: bytes) -> None:
        for item in ReplyFrame.FromString(body).items:
            waiting.pop(item.id)(item)

    server = await loop.create_server(lambda: Bare(ReplyFrame, serve), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    transport, end = await loop.create_connection(lambda: Bare(RequestFrame, answer), "127.0.0.1", port)
    last = 0

    def submit(request: PredictRequest, on_reply: Callable[[PredictReply], None]) -> None:
        nonlocal last
        last += 1
        request.id = last
        waiting[last] = on_reply
        end.push(request)

    yield submit
    transport.close()
    server.close()


class Echo:
    """Answers every item with its inputs."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def on_request_frame(self, frame: RequestFrame) -> None:
        for item in frame.items:
            self.peer.reply(PredictReply(id=item.id, version="1", outputs=item.inputs))

    def on_closed(self) -> None:
        pass


@asynccontextmanager
async def channel() -> AsyncIterator[Submit]:
    loop = asyncio.get_running_loop()
    server = FrameServer(Echo, credential="benchmark", instance="server", role="worker")
    port = await server.start("127.0.0.1", 0)
    calls = FrameCalls(f"127.0.0.1:{port}", credential="benchmark", role="router", instance="client")
    calls.start()
    await calls.wait_connected(5)

    def submit(request: PredictRequest, on_reply: Callable[[PredictReply], None]) -> None:
        calls.submit(request, loop.time() + 10, on_reply)

    yield submit
    await calls.close()
    await server.close()


async def closed_loop(submit: Submit, concurrency: int, data: bytes, seconds: float) -> float:
    """Items per second with `concurrency` callers that each send the next item when theirs is answered."""
    end = time.perf_counter() + seconds
    answered = running = 0
    done = asyncio.Event()

    def send() -> None:
        tensor = Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[1, len(data) // 4], data=data)
        submit(PredictRequest(model="cancer", unit="user-1", request_id=b"r" * 16, inputs=[tensor]), again)

    def again(_: PredictReply) -> None:
        nonlocal answered, running
        answered += 1
        if time.perf_counter() < end:
            send()
        else:
            running -= 1
            if not running:
                done.set()

    start = time.perf_counter()
    for _ in range(concurrency):
        running += 1
        send()
    await done.wait()
    return answered / (time.perf_counter() - start)


async def main(seconds: float, rounds: int) -> None:
    print("items/s             bare      channel   ratio")
    for size, concurrency in ((120, 1), (120, 32), (120, 512), (602_112, 8)):
        rates: dict[str, list[float]] = {"bare": [], "channel": []}
        for _ in range(rounds):
            for name, make in (("bare", bare), ("channel", channel)):
                async with make() as submit:
                    rates[name].append(await closed_loop(submit, concurrency, b"\0" * size, seconds))
        one, two = (statistics.median(rates[name]) for name in ("bare", "channel"))
        print(f"{size:>7} B c={concurrency:<4} {one:>10,.0f} {two:>10,.0f}   {two / one:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    uvloop.run(main(arguments.seconds, arguments.rounds))
