"""ModelStreamInfer on a transport in memory: how much of it there may be, and what that takes from others. A
tick is a second."""

from __future__ import annotations

import tracemalloc

import pytest
from headrace.v1.dataplane_pb2 import PredictReply, SealedReply
from headrace.v1.tensor_pb2 import Code
from open_inference.open_inference_pb2 import ModelInferRequest

from services.common.frames.wire import ErrorCode
from services.gateway.rpc.limits import RpcLimits
from tests.fixtures.rpc import Front, infer, prefixed
from tests.fixtures.rpc_streams import ids, label, messages, nothing_is_left, opened, say, turning
from tests.fixtures.waiting import eventually
from tests.fixtures.wires import padded


@pytest.mark.parametrize("how", ["reset", "lost"])
async def test_what_nobody_waits_for_is_taken_out_of_where_it_waits(how: str) -> None:
    front = Front(RpcLimits(max_stream_requests=2))
    client = front.client()
    stream = await opened(client)
    await say(client, stream, *(infer(id=str(number)) for number in range(5)))
    await say(client, stream, infer(id="raw"))
    await say(client, stream, prefixed(infer())[:20])
    front.router.answer(last=True)  # it waits for the one before
    assert len(front.router.waiting) == 1
    assert front.service.bodies.held > 0
    if how == "reset":
        client.h2.reset_stream(stream)
        await client.turn()
    else:
        client.connection.connection_lost(None)
    assert nothing_is_left(front, client)
    assert front.router.cancelled == [1]


async def test_so_many_requests_are_under_way_and_the_rest_waits() -> None:
    front = Front(RpcLimits(max_stream_requests=4, stream_window_bytes=1 << 16))
    client = front.client()
    stream = await opened(client)
    count = 60
    for number in range(count):
        client.send(stream, prefixed(infer(float(number), id=str(number))), end=number == count - 1)
    await client.turn()
    assert len(front.router.waiting) == 4
    answered = 0
    while front.router.waiting:
        assert len(front.router.waiting) <= 4
        front.router.answer(last=bool(answered % 3))
        answered += 1
        await client.turn()
    answer = client.answers[stream]
    assert ids(answer) == [str(number) for number in range(count)]
    assert [label(said) for said in messages(answer)] == [int(number < 15) for number in range(count)]
    assert answer.status == Code.CODE_OK
    assert nothing_is_left(front, client)


async def test_a_client_that_floods_is_given_no_window_and_takes_nothing_from_others() -> None:
    front = Front(RpcLimits(max_stream_requests=4, stream_window_bytes=1 << 16, window_bytes=1 << 20))
    client = front.client()
    stream = await opened(client)
    body = prefixed(infer())
    sent = 0
    while client.h2.local_flow_control_window(stream) >= 10 * len(body):
        client.send(stream, body * 10, end=False)
        sent += 10
        await client.turn()
    # Of the window that it had at first, at most what came before there was too much is granted again.
    assert sent * len(body) < 2 << 16
    assert len(front.router.waiting) == 4
    beside = client.ask(infer(20.0))
    await client.turn()
    front.router.answer(last=True)
    await client.turn()
    assert client.answers[beside].status == Code.CODE_OK
    front.router.answer_all()
    await client.turn()
    while front.router.waiting:
        front.router.answer_all()
        await client.turn()
    assert client.h2.local_flow_control_window(stream) >= 1 << 15
    client.send(stream, body)
    await client.turn()
    front.router.answer_all()
    await client.turn()
    assert len(messages(client.answers[stream])) == sent + 1
    assert client.answers[stream].status == Code.CODE_OK
    assert nothing_is_left(front, client)


async def test_a_client_that_does_not_read_is_not_read_from() -> None:
    front = Front(RpcLimits(max_stream_bytes=40_000))
    client = front.client(window=1000)
    client.acknowledging = False
    stream = await opened(client)
    await say(client, stream, *(infer(id=str(number)) for number in range(8)))
    for _ in range(8):
        front.router.answer(padded(10_000))
    await client.turn()
    held = front.service.bodies.held
    assert held > 70_000
    await say(client, stream, infer(id="more"))
    assert not front.router.waiting
    client.acknowledging = True
    while len(client.answers[stream].data) < 8 * 10_000:
        client.h2.increment_flow_control_window(5000, stream)
        client.h2.increment_flow_control_window(5000)
        await client.turn()
    await client.turn()
    assert len(front.router.waiting) == 1
    client.h2.end_stream(stream)
    front.router.answer()
    client.h2.increment_flow_control_window(9000, stream)
    await client.turn()
    assert ids(client.answers[stream]) == [*map(str, range(8)), "more"]
    assert nothing_is_left(front, client)


async def test_an_answer_that_the_process_has_no_room_for_ends_the_stream() -> None:
    front = Front(max_held_bytes=1000)
    client = front.client()
    stream = await opened(client)
    await say(client, stream, infer(), infer())
    front.router.answer(padded(40_000))
    await client.turn()
    assert client.answers[stream].status == Code.CODE_UNAVAILABLE
    assert front.router.cancelled == [2]
    assert nothing_is_left(front, client)


async def test_answers_that_wait_for_one_before_them_keep_no_requests() -> None:
    front = Front()
    client = front.client()
    stream = await opened(client)
    large = ModelInferRequest.FromString(infer())
    large.inputs[0].shape[0] = rows = 4000
    large.raw_input_contents[0] *= rows
    body = large.SerializeToString()
    refused = PredictReply(code=Code.CODE_UNAVAILABLE, message="away").SerializeToString()

    async def ask_and_refuse(count: int) -> None:
        for _ in range(count):
            await say(client, stream, body)
            _ticket, (_request, on_reply) = front.router.waiting.popitem()
            on_reply(SealedReply.FromString(refused))
            front.router.requests.clear()

    await say(client, stream, infer(id="first"))
    await ask_and_refuse(3)  # teach its form
    tracemalloc.start()
    try:
        await ask_and_refuse(20)
        now, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now < 5 * len(body)
    front.router.answer()
    await client.turn()
    assert len(messages(client.answers[stream])) == 24


async def test_what_waits_counts_among_the_bytes_of_the_process() -> None:
    front = Front(RpcLimits(max_stream_requests=1), max_held_bytes=1000)
    client = front.client()
    stream = await opened(client)
    await say(client, stream, *(infer() for _ in range(3)))
    held = front.service.bodies.held
    assert held > 2 * len(infer())
    await say(client, stream, infer())
    assert front.service.bodies.held == held + 5 + len(infer())
    while not client.answers[stream].ended:
        await say(client, stream, infer())
    assert client.answers[stream].status == Code.CODE_UNAVAILABLE
    assert front.router.cancelled == [1]
    assert nothing_is_left(front, client)


async def test_a_message_that_is_cut_off_behind_others_that_wait_ends_the_stream() -> None:
    front = Front(RpcLimits(max_stream_requests=1))
    client = front.client()
    stream = await opened(client)
    await say(client, stream, infer(), infer())
    client.send(stream, prefixed(infer())[:-1])
    await client.turn()
    assert not client.answers[stream].ended
    front.router.answer_all()
    await client.turn()
    assert client.answers[stream].status == Code.CODE_INTERNAL
    assert nothing_is_left(front, client)


async def test_a_message_for_which_there_is_no_room_in_the_process_ends_the_stream() -> None:
    front = Front(RpcLimits(max_stream_requests=1), max_held_bytes=len(infer()))
    client = front.client()
    stream = await opened(client)
    await say(client, stream, infer(), infer())
    assert client.answers[stream].status == Code.CODE_UNAVAILABLE
    assert nothing_is_left(front, client)


async def test_answers_allow_for_the_windows_that_their_client_grants() -> None:
    front = Front(RpcLimits(max_control_frames=50))
    client = front.client()
    stream = await opened(client)
    for _ in range(60):
        await say(client, stream, infer())
        front.router.answer()
        client.h2.increment_flow_control_window(1, stream)
        client.h2.increment_flow_control_window(1)
        await client.turn()
    assert client.ended is None
    assert len(messages(client.answers[stream])) == 60


async def test_answers_that_nobody_reads_are_bounded() -> None:
    front = Front(max_held_bytes=100_000)
    client = front.client(window=0)
    stream = await opened(client)
    await say(client, stream, *(infer() for _ in range(4)))
    for _ in range(3):
        front.router.answer(padded(40_000))
    await client.turn()
    assert client.answers[stream].reset == ErrorCode.CANCEL
    assert nothing_is_left(front, client)


async def test_large_messages_are_few_and_in_their_order() -> None:
    front = Front(RpcLimits(max_stream_large=2), inline_bytes=100)
    client = front.client()
    stream = await opened(client)
    unknown = b"\xa2\x06\xc8\x01" + bytes(200)  # a field that no message has
    await say(client, stream, *(infer(id=str(number)) + unknown for number in range(6)), end=True)
    most = 0
    while not client.answers[stream].ended:
        await turning(client, lambda: front.router.waiting)
        most = max(most, len(front.router.waiting))
        front.router.answer()
        await client.turn()
    assert most <= 2
    assert ids(client.answers[stream]) == [str(number) for number in range(6)]
    assert nothing_is_left(front, client)
    front.service.close()


async def test_requests_that_fail_at_once_leave_room_for_others_in_a_turn() -> None:
    front = Front(RpcLimits(max_stream_begun=8))
    client = front.client()
    stream = await opened(client)
    bad = b"\x0a\x01x\x1a\x01i"
    client.send(stream, prefixed(bad) * 100)
    client.connection.data_received(client.h2.data_to_send())
    at_once = sum(front.metrics.cell("grpc_infer", "", 404).buckets)
    assert at_once == 8
    await client.turn(30)
    assert ids(client.answers[stream]) == ["i"] * 100
    assert client.answers[stream].status == Code.CODE_OK
    assert nothing_is_left(front, client)


async def test_a_message_too_large_ends_the_stream() -> None:
    front = Front(RpcLimits(max_message_bytes=1000))
    client = front.client()
    stream = await opened(client)
    client.send(stream, b"\0" + (2000).to_bytes(4, "big"), end=False)
    await client.turn()
    assert client.answers[stream].status == Code.CODE_RESOURCE_EXHAUSTED
    assert nothing_is_left(front, client)


async def test_a_stream_may_be_silent_but_not_in_the_middle_of_a_message() -> None:
    front = Front(RpcLimits(ping_after_s=100_000))
    client = front.client()
    stream = await opened(client)
    client.tick(1000)
    await say(client, stream, infer(id="a"))
    client.send(stream, prefixed(infer())[:30], end=False)
    await client.turn()
    client.tick(30)
    assert not client.answers[stream].ended
    client.tick()
    await client.turn()
    assert client.answers[stream].status == Code.CODE_DEADLINE_EXCEEDED
    assert nothing_is_left(front, client)


@pytest.mark.parametrize("how", ["error", "drain"])
async def test_what_is_not_listened_to_any_more_is_not_late(how: str) -> None:
    """In the middle of a message, while what came before it is under way."""
    front = Front(RpcLimits(ping_after_s=100_000, drain_notice_s=0.0))
    client = front.client()
    stream = await opened(client, triton_grpc_error="true")
    wrong = [b"\xff"] if how == "error" else []
    sent = b"".join(map(prefixed, [infer(id="a"), *wrong, infer()]))
    client.send(stream, sent[:-5], end=False)
    await client.turn()
    if how == "drain":
        client.connection.drain()
        await eventually(lambda: client.cable.written.count(b"draining") == 3)
    client.tick(100)
    assert len(front.router.waiting) == 1
    front.router.answer()
    await eventually(lambda: b"grpc-status" in client.cable.written)
    assert b"\x1a\x01a" in client.cable.take()
    assert front.service.bodies.held == 0


async def test_a_client_that_may_send_no_more_is_not_late() -> None:
    front = Front(RpcLimits(max_stream_requests=1, ping_after_s=100_000))
    client = front.client()
    stream = await opened(client)
    body = prefixed(infer(id="a"))
    client.send(stream, body * 2 + body[:30], end=False)
    await client.turn()
    client.tick(1000)
    front.router.answer()
    await client.turn()
    client.send(stream, body[30:])
    for _ in range(2):
        front.router.answer()
        await client.turn()
    assert ids(client.answers[stream]) == ["a"] * 3
    assert client.answers[stream].status == Code.CODE_OK


async def test_streams_are_bounded() -> None:
    front = Front(RpcLimits(max_infer_streams=1))
    client, other = front.client(), front.client()
    first = await opened(client)
    refused = await opened(other)
    assert other.answers[refused].status == Code.CODE_RESOURCE_EXHAUSTED
    client.h2.reset_stream(first)
    await client.turn()
    again = await opened(other)
    await say(other, again, infer(), end=True)
    front.router.answer()
    await other.turn()
    assert other.answers[again].status == Code.CODE_OK
