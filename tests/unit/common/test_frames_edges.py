"""The edges of what a frame stream does: the largest reply, the earliest deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import pytest
from headrace.v1.dataplane_pb2 import Hello, PredictReply, PredictRequest, ReplyFrame, RequestFrame
from headrace.v1.tensor_pb2 import Code

from services.common.frames import Limits
from services.common.frames.deadlines import Deadlines
from services.common.frames.detached import Buffer
from services.common.frames.peer import Peer

MAX_ITEM = 1000


class Outlet:
    can_send = True

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send_message(self, parts: Iterable[Buffer], size: int) -> None:
        message = b"".join(parts)
        assert len(message) == size
        self.sent.append(message)

    def on_flushed(self, waiting: int) -> None:
        assert not waiting


def reply_of(size: int) -> bytes:
    """A serialized reply of exactly `size` bytes that another stream knows as 99."""
    bare = len(PredictReply(id=99, message="a" * 900).SerializeToString()) - 900
    payload = PredictReply(id=99, message="a" * (size - bare)).SerializeToString()
    assert len(payload) == size
    return payload


@pytest.mark.parametrize("item_id", [7, 1 << 20, 1 << 60])
async def test_a_forwarded_reply_of_any_size_goes_out_under_its_own_id(item_id: int) -> None:
    for size in range(MAX_ITEM - 12, MAX_ITEM + 2):
        outlet = Outlet()
        peer = Peer(outlet, Limits(max_message_bytes=MAX_ITEM + 16), Hello(role="g", instance="g"), "r")
        peer.take(RequestFrame(items=[PredictRequest(id=item_id), PredictRequest(id=99)]))
        peer.forward(item_id, reply_of(size))
        await asyncio.sleep(0)
        (message,) = outlet.sent
        (reply,) = ReplyFrame.FromString(message).items
        assert reply.id == item_id
        assert reply.code in {Code.CODE_OK, Code.CODE_INTERNAL}
        assert (reply.code == Code.CODE_OK) == (len(message) - 3 <= MAX_ITEM and len(reply.message) > 900)
        assert peer.in_flight == 1


class Timers:
    """What `Deadlines` asks of an event loop, in simulated time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(when, call))
        return self.timers[-1]

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer.when <= self.now and not timer.cancelled]
        self.timers = [timer for timer in self.timers if timer.when > self.now and not timer.cancelled]
        for timer in due:
            timer.call()


class Timer:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when, self.call, self.cancelled = when, call, False

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize("waiting", [0, 10_000])
def test_a_stream_of_short_deadlines_does_not_put_them_off(waiting: int) -> None:
    timers = Timers()
    forever = timers.now + 1e6
    pending: dict[int, tuple[object, float]] = {-n: (None, forever) for n in range(1, waiting + 1)}
    lateness: list[float] = []

    def late(local_id: int) -> None:
        lateness.append(timers.now - pending.pop(local_id)[1])

    deadlines = Deadlines(timers, pending, late)  # type: ignore[arg-type]  # the part of a loop it uses
    for n in range(1, 501):
        pending[n] = (None, timers.now + 0.0015)
        if pending[n][1] < deadlines.next_look:
            deadlines.look_at(pending[n][1])
        assert len([timer for timer in timers.timers if not timer.cancelled]) == 1
        timers.advance(0.001)
    assert len(lateness) > 400
    assert max(lateness) < 0.05


def test_an_earlier_deadline_is_looked_at_earlier() -> None:
    timers = Timers()
    pending: dict[int, tuple[object, float]] = {1: (None, 200.0), 2: (None, 101.0)}
    late: list[int] = []

    def tell(local_id: int) -> None:
        late.append(local_id)
        del pending[local_id]

    deadlines = Deadlines(timers, pending, tell)  # type: ignore[arg-type]  # the part of a loop it uses
    deadlines.look_at(200.0)
    deadlines.look_at(101.0)
    timers.advance(2.0)
    assert late == [2]
    assert deadlines.next_look == 200.0
