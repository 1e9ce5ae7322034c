"""The gRPC front on a transport in memory, with `h2` at the other end. A tick is a second."""

from __future__ import annotations

import asyncio
import gzip
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from headrace.v1.tensor_pb2 import Code
from hpack import Encoder
from open_inference.open_inference_pb2 import InferParameter, ModelInferResponse

from services.common.frames import wire
from services.common.frames.header_blocks import literal
from services.common.frames.wire import ErrorCode, frame, settings
from services.gateway.rpc.limits import RpcLimits
from services.gateway.rpc.methods import Methods
from tests.fixtures.gateway import PREDICT_ONLY
from tests.fixtures.rpc import INFER, Answer, Client, Front, infer, prefixed
from tests.fixtures.waiting import eventually
from tests.fixtures.wires import padded

SMALL = RpcLimits(
    max_message_bytes=100_000,
    stream_window_bytes=1 << 16,
    window_bytes=1 << 16,
    max_frame_bytes=1 << 14,
    max_streams=4,
    max_control_frames=50,
    max_resets=5,
    max_connections=2,
)


def label(answer: Answer) -> int:
    assert answer.trailers["grpc-status"] == "0"
    assert answer.ended
    said = ModelInferResponse.FromString(answer.message)
    assert said.outputs[0].name == "label"
    return int(struct.unpack("<q", said.raw_output_contents[0])[0])


async def test_a_call_and_its_answer() -> None:
    front = Front()
    client = front.client()
    stream = client.ask(infer(1.0, id="r"), traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-00")
    await client.turn()
    assert not client.answers[stream].headers
    front.router.answer()
    await client.turn()
    answer = client.answers[stream]
    assert answer.headers == {":status": "200", "content-type": "application/grpc"}
    assert label(answer) == 1
    assert ModelInferResponse.FromString(answer.message).id == "r"
    assert client.connection.streams == 0


async def test_calls_on_one_connection_are_answered_in_any_order_and_written_together() -> None:
    front = Front()
    client = front.client()
    await client.turn()
    for _again in range(3):  # the first ones teach the head's block and the message's form
        streams = [client.ask(infer(first)) for first in (1.0, 20.0, 2.0, 30.0)]
        await client.turn()
        writes = client.cable.writes
        while front.router.waiting:
            front.router.answer(last=True)
        await client.turn()
        assert client.cable.writes == writes + 1
        assert [label(client.answers[stream]) for stream in streams] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ({"x_api_key": None}, Code.CODE_UNAUTHENTICATED),
        ({"x_api_key": "hr_nobody"}, Code.CODE_UNAUTHENTICATED),
        ({"grpc_encoding": "br"}, Code.CODE_UNIMPLEMENTED),
        ({"grpc_timeout": "5"}, Code.CODE_INTERNAL),
        ({"grpc_timeout": "123456789S"}, Code.CODE_INTERNAL),
        ({"path": "/inference.GRPCInferenceService/Nothing"}, Code.CODE_UNIMPLEMENTED),
        ({"x_long": "x" * 17_000}, Code.CODE_RESOURCE_EXHAUSTED),
    ],
)
async def test_heads_that_are_refused(metadata: dict[str, str | None], code: Code) -> None:
    client = Front().client()
    await client.turn()
    path = metadata.pop("path", None) or INFER
    stream = client.head(path, **metadata)  # nothing else comes
    await client.turn()
    answer = client.answers[stream]
    assert (answer.status, answer.headers[":status"]) == (code, "200")
    assert answer.reset in (None, ErrorCode.NO_ERROR)
    assert not client.ended
    assert client.connection.streams == 0


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([(":method", "GET")], "405"),
        ([], "415"),
        ([("content-type", "application/json")], "415"),
        ([("content-type", "application/grpc-web+proto")], "415"),
    ],
)
async def test_what_is_no_grpc_is_refused_over_http(fields: list[tuple[str, str]], status: str) -> None:
    client = Front().client()
    await client.turn()
    client.answers[1] = Answer()
    said = {":method": "POST", ":scheme": "http", ":path": INFER, ":authority": "x", "content-type": "a/b"}
    client.h2.send_headers(1, list((said | dict(fields)).items()), end_stream=True)
    await client.turn()
    assert client.answers[1].headers == {":status": status}


@pytest.mark.parametrize("said", ["application/grpc+proto", "application/grpc;charset=utf-8"])
async def test_what_messages_are_made_of_may_be_said(said: str) -> None:
    front = Front()
    client = front.client()
    stream = client.ask(content_type=said)
    await client.turn()
    front.router.answer()
    await client.turn()
    assert label(client.answers[stream]) == 1


@pytest.mark.parametrize(
    "fields",
    [
        [(":method", "POST"), (":path", INFER)],
        [(":method", "POST"), (":scheme", "http"), (":path", INFER), ("connection", "close")],
        [(":method", "POST"), (":scheme", "http"), (":path", INFER), ("Upper", "case")],
        [("te", "trailers"), (":method", "POST"), (":scheme", "http"), (":path", INFER)],
        [(":method", "POST"), (":scheme", "http"), (":path", INFER), (":path", INFER)],
        [(":method", "POST"), (":scheme", "http"), (":path", INFER), (":status", "200")],
    ],
)
async def test_malformed_heads_reset_their_stream_only(fields: list[tuple[str, str]]) -> None:
    front = Front()
    client = front.client()
    await client.turn()
    client.connection.data_received(frame(1, 5, 1, Encoder().encode(fields)))
    await asyncio.sleep(0)
    assert wire.reset(1, ErrorCode.PROTOCOL_ERROR) in client.cable.take()
    client.connection.data_received(frame(1, 5, 3, Encoder().encode([])))
    await asyncio.sleep(0)
    assert wire.reset(3, ErrorCode.PROTOCOL_ERROR) in client.cable.take()


@pytest.mark.parametrize(
    ("body", "flag", "metadata", "code"),
    [
        (b"\xff\xff", 0, {}, Code.CODE_INVALID_ARGUMENT),
        (infer(model_version="9"), 0, {}, Code.CODE_NOT_FOUND),
        (infer(), 1, {}, Code.CODE_INTERNAL),
        (infer(), 1, {"grpc_encoding": "identity"}, Code.CODE_INTERNAL),
        (infer(), 2, {}, Code.CODE_INTERNAL),
        (infer(), 1, {"grpc_encoding": "gzip"}, Code.CODE_INVALID_ARGUMENT),
        (gzip.compress(bytes(40_000)), 1, {"grpc_encoding": "gzip"}, Code.CODE_RESOURCE_EXHAUSTED),
    ],
    ids=[
        "no message",
        "an unknown version",
        "compressed in no way",
        "compressed as it is",
        "no prefix",
        "not compressed",
        "inflates",
    ],
)
async def test_messages_that_are_refused(
    body: bytes, flag: int, metadata: dict[str, str | None], code: Code
) -> None:
    client = Front(max_body_bytes=10_000).client()
    stream = client.ask(body, flag, **metadata)
    answer = client.answers[stream]
    while not answer.ended:  # what is compressed is unpacked in a thread
        await client.turn()
        await asyncio.sleep(0.001)
    assert answer.status == code
    assert client.connection.streams == 0


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_messages(name: str, pack: Callable[[bytes], bytes]) -> None:
    front = Front()
    client = front.client()
    compressed = client.ask(pack(infer(20.0)), 1, grpc_encoding=name)
    plain = client.ask(infer(20.0), grpc_encoding=name)
    while len(front.router.waiting) < 2:
        await client.turn()
        await asyncio.sleep(0.001)
    front.router.answer_all()
    await client.turn()
    assert label(client.answers[compressed]) == label(client.answers[plain]) == 0


async def test_messages_in_pieces_of_any_size() -> None:
    front = Front()
    client = front.client()
    await client.turn()
    body = prefixed(infer())
    for size in (1, 3, 5, 6, len(body) - 1):
        stream = client.head()
        for at in range(0, len(body), size):
            client.send(stream, body[at : at + size], end=False)
            await client.turn(1)
        client.send(stream, b"")
        await client.turn()
        front.router.answer()
        await client.turn()
        assert label(client.answers[stream]) == 1
    assert front.service.bodies.held == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "one message"), (prefixed(infer()) * 2, "one message"), (prefixed(infer())[:-1], "inside")],
)
async def test_a_unary_call_has_one_whole_message(data: bytes, words: str) -> None:
    client = Front().client()
    stream = client.head()
    client.send(stream, data)
    await client.turn()
    answer = client.answers[stream]
    assert answer.status == Code.CODE_INTERNAL
    assert words in answer.headers["grpc-message"]


async def test_strangers_and_too_large_messages_are_told_before_the_rest_comes() -> None:
    front = Front(SMALL)
    client = front.client()
    await client.turn()
    announced = b"\0" + (1 << 30).to_bytes(4, "big") + bytes(100)
    stranger, guest = client.head(x_api_key="hr_nobody"), client.head()
    client.send(stranger, announced, end=False)
    client.send(guest, announced, end=False)
    await client.turn()
    assert client.answers[stranger].status == Code.CODE_UNAUTHENTICATED
    assert client.answers[guest].status == Code.CODE_RESOURCE_EXHAUSTED
    assert client.answers[guest].reset == ErrorCode.NO_ERROR
    assert front.service.bodies.held == 0


async def test_unfinished_messages_are_bounded_over_all_connections() -> None:
    front = Front(max_held_bytes=5000)
    one, other = front.client(), front.client()
    streams = []
    for client in (one, other):
        await client.turn()
        stream = client.head()
        client.send(stream, b"\0" + (9000).to_bytes(4, "big") + bytes(4000), end=False)
        await client.turn()
        streams.append(client.answers[stream])
    assert not streams[0].ended
    assert streams[1].status == Code.CODE_UNAVAILABLE
    one.connection.connection_lost(None)
    assert front.service.bodies.held == 0


async def test_a_reset_takes_the_call_out_of_where_it_waits() -> None:
    front = Front()
    client = front.client()
    streams = [client.ask(), client.ask()]
    await client.turn()
    client.h2.reset_stream(streams[0])
    await client.turn()
    assert front.router.cancelled == [1]
    front.router.answer()
    await client.turn()
    assert label(client.answers[streams[1]]) == 1
    client.ask()
    await client.turn()
    client.connection.connection_lost(None)
    assert front.router.cancelled == [1, 3]


async def test_the_deadline_goes_with_the_call() -> None:
    front = Front()
    client = front.client()
    loop = asyncio.get_running_loop()
    for said, parameter, seconds in (
        ("100m", 0, 0.1),
        ("2S", 1_000_000, 1.0),
        ("1S", 2_000_000, 1.0),
        ("1H", 0, 300),
    ):
        parameters = {"timeout": InferParameter(int64_param=parameter)} if parameter else {}
        before = loop.time()
        client.ask(infer(parameters=parameters), grpc_timeout=said)
        await client.turn()
        deadline = front.router.deadlines[-1]
        assert deadline is not None
        assert before + seconds <= deadline <= loop.time() + seconds


async def test_messages_that_do_not_come_in_time() -> None:
    front = Front()
    client = front.client()
    patient, hurried, silent = client.head(), client.head(grpc_timeout="1S"), client.head()
    client.send(patient, b"\0\0", end=False)
    await client.turn()
    client.tick(2)
    await client.turn()
    assert client.answers[hurried].status == Code.CODE_DEADLINE_EXCEEDED
    assert not client.answers[patient].ended
    client.tick(30)
    await client.turn()
    assert client.answers[patient].status == Code.CODE_DEADLINE_EXCEEDED
    assert client.answers[silent].status == Code.CODE_DEADLINE_EXCEEDED
    assert front.service.bodies.held == 0


async def test_large_answers_wait_for_windows_and_share_them() -> None:
    front = Front()
    client = front.client()
    client.acknowledging = False
    streams = [client.ask() for _ in range(3)]
    await client.turn()
    client.connection.pause_writing()
    for _ in streams:
        front.router.answer(padded(60_000))
    client.connection.resume_writing()
    await client.turn()
    came = [len(client.answers[stream].data) for stream in streams]
    assert sum(came) == wire.DEFAULT_WINDOW
    assert min(came) > 10_000
    assert front.service.bodies.held > 180_000
    small = client.ask(infer(), x_api_key="hr_nobody")  # what needs no window goes on
    await client.turn()
    assert client.answers[small].status == Code.CODE_UNAUTHENTICATED
    for stream in streams:
        client.h2.acknowledge_received_data(len(client.answers[stream].data), stream)
    client.acknowledging = True
    await client.turn(20)
    assert [label(client.answers[stream]) for stream in streams] == [1, 1, 1]
    assert front.service.bodies.held == 0
    assert client.connection.streams == 0


async def test_a_window_of_one_frame_is_enough() -> None:
    front = Front()
    client = front.client(window=100)
    stream = client.ask()
    await client.turn()
    front.router.answer(padded(5_000))
    await client.turn(300)
    assert label(client.answers[stream]) == 1


def heads(count: int, message: bytes | None = None) -> bytes:
    """That many calls; with `message` whole ones."""
    fields = (":method", "POST"), (":scheme", "http"), (":path", INFER), ("content-type", "application/grpc")
    block = b"".join(
        literal(name.encode(), value.encode()) for name, value in (*fields, ("x-api-key", PREDICT_ONLY))
    )
    asked = [
        frame(1, 4, stream, block) + (b"" if message is None else frame(0, 1, stream, prefixed(message)))
        for stream in range(1, 2 * count, 2)
    ]
    return b"".join(asked)


def initial_window(*sizes: int) -> bytes:
    """One SETTINGS frame that says all of them."""
    said = [wire.INITIAL_WINDOW_SIZE.to_bytes(2, "big") + size.to_bytes(4, "big") for size in sizes]
    return frame(wire.SETTINGS, 0, 0, b"".join(said))


async def test_calls_without_a_window_wait_and_hold_up_no_other() -> None:
    front = Front(SMALL)
    client = front.client()
    await client.turn()
    client.connection.data_received(initial_window(9, 0) + heads(4, infer()))
    front.router.answer_all()
    await asyncio.sleep(0)
    client.cable.take()
    client.connection.data_received(wire.window_update(0, 1000) + wire.window_update(5, 1))
    await asyncio.sleep(0)
    assert client.cable.take() == frame(0, 0, 5, b"\0")
    client.connection.data_received(wire.window_update(3, 70_000))
    await asyncio.sleep(0)
    assert client.cable.take().count(b"grpc-status") == 1
    assert client.connection.streams == 3
    client.tick(30)
    client.connection.data_received(wire.reset(7, ErrorCode.CANCEL) + initial_window(60_000))
    await asyncio.sleep(0)
    assert client.cable.take().count(b"grpc-status") == 2
    assert client.connection.streams == 0
    assert not client.cable.closed


async def test_what_windows_cost_does_not_grow_with_the_calls_that_wait() -> None:
    """Else some kilobytes of control frames stop everybody: 65 KB of SETTINGS took half a second, 117 KB of
    WINDOW_UPDATE more than two."""
    front = Front()
    client, other = front.client(), front.client()
    await client.turn()
    await other.turn()
    client.connection.data_received(initial_window(0) + heads(1000, infer()))
    other.connection.data_received(heads(1000))
    await asyncio.sleep(0)
    front.router.answer_all()
    began = time.thread_time()
    client.connection.data_received(b"".join([wire.window_update(0, 1)] * 9000))
    other.connection.data_received(initial_window(*[65_534, 65_535] * 5400))
    assert time.thread_time() - began < 0.3
    assert client.connection.streams == other.connection.streams == 1000


async def test_changes_of_many_windows_count_as_many_control_frames() -> None:
    front = Front(SMALL)
    quiet, busy = front.client(), front.client()
    await quiet.turn()
    await busy.turn()
    busy.connection.data_received(heads(4))
    changes = b"".join(initial_window(size) for size in range(1, 31))
    quiet.connection.data_received(changes)
    busy.connection.data_received(changes)
    await asyncio.sleep(0)
    assert quiet.connection.streams == 0
    assert b"too many control frames" not in quiet.cable.take()
    assert code_of(busy.cable.take()) is ErrorCode.ENHANCE_YOUR_CALM


async def test_answers_that_nobody_reads_are_bounded() -> None:
    front = Front(max_held_bytes=100_000)
    client = front.client(window=0)
    streams = [client.ask() for _ in range(3)]
    await client.turn()
    for _ in streams:
        front.router.answer(padded(40_000))
    await client.turn()
    assert [client.answers[stream].ended for stream in streams] == [False, False, True]
    assert client.answers[streams[2]].status == Code.CODE_UNAVAILABLE
    client.tick(31)
    assert client.cable.closed
    client.connection.connection_lost(None)
    assert front.service.bodies.held == 0


async def test_a_socket_that_takes_nothing_more_is_not_read_from() -> None:
    front = Front()
    client = front.client()
    stream = client.ask()
    await client.turn()
    client.connection.pause_writing()
    assert client.cable.reading_held
    front.router.answer(padded(30_000))
    await client.turn()
    assert len(client.answers[stream].data) == 0
    client.connection.resume_writing()
    assert not client.cable.reading_held
    await client.turn()
    assert label(client.answers[stream]) == 1
    client.connection.pause_writing()
    client.tick(31)
    assert client.cable.closed


async def test_what_a_block_says_is_not_believed_once_the_table_changed() -> None:
    """The same bytes mean another key after the table's entries moved."""
    front = Front()
    client = front.client()
    await client.turn()
    base = [(":method", "POST"), (":scheme", "http"), (":path", INFER), ("content-type", "application/grpc")]
    encoder = Encoder()

    def ask(stream: int, block: bytes) -> bytes:
        client.connection.data_received(frame(1, 4, stream, block) + frame(0, 1, stream, prefixed(infer())))
        return block

    ask(1, encoder.encode([*base, ("x-api-key", PREDICT_ONLY)]))
    indexed = [ask(stream, encoder.encode([*base, ("x-api-key", PREDICT_ONLY)])) for stream in (3, 5, 7)]
    assert len(set(indexed)) == 1
    assert len(front.router.waiting) == 4
    # A block of trailers adds an entry: what was at index 62 is at 63 now, and so on.
    client.connection.data_received(
        frame(1, 4, 9, encoder.encode(base)) + frame(1, 5, 9, encoder.encode([("x-api-key", "hr_nobody")]))
    )
    await asyncio.sleep(0)
    client.cable.take()
    ask(11, indexed[0])
    await asyncio.sleep(0)
    assert len(front.router.waiting) == 4
    assert client.cable.take() == wire.reset(11, ErrorCode.PROTOCOL_ERROR)


VIOLATIONS = {
    "data on stream 0": (frame(0, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data on an idle stream": (frame(0, 0, 9, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data after the end": (frame(0, 0, 1, b"x"), ErrorCode.STREAM_CLOSED),
    "headers on stream 0": (frame(1, 4, 0), ErrorCode.PROTOCOL_ERROR),
    "headers on an even stream": (frame(1, 4, 4, b"\x88"), ErrorCode.PROTOCOL_ERROR),
    "headers in the middle of a stream": (frame(1, 5, 1, b"\x88"), ErrorCode.PROTOCOL_ERROR),
    "undecodable header block": (frame(1, 4, 5, b"\xff\xff\xff\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR),
    "endless header block": (frame(1, 0, 5) + frame(9, 0, 5, bytes(16384)) * 2, ErrorCode.ENHANCE_YOUR_CALM),
    "continuation flood": (frame(1, 0, 5) + frame(9, 0, 5) * 60, ErrorCode.ENHANCE_YOUR_CALM),
    "interrupted header block": (
        frame(1, 0, 5, b"\x88") + frame(6, 0, 0, bytes(8)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "continuation without headers": (frame(9, 4, 1), ErrorCode.PROTOCOL_ERROR),
    "priority without a stream": (frame(2, 0, 0, b"12345"), ErrorCode.PROTOCOL_ERROR),
    "reset of a wrong size": (frame(3, 0, 1, b"123"), ErrorCode.FRAME_SIZE_ERROR),
    "reset of an idle stream": (frame(3, 0, 7, b"1234"), ErrorCode.PROTOCOL_ERROR),
    "settings on a stream": (frame(4, 0, 1), ErrorCode.PROTOCOL_ERROR),
    "settings acknowledgement with a payload": (frame(4, 1, 0, b"123456"), ErrorCode.FRAME_SIZE_ERROR),
    "window too large": (settings({4: 1 << 31}), ErrorCode.FLOW_CONTROL_ERROR),
    "push promise": (frame(5, 4, 1, b"\0\0\0\2"), ErrorCode.PROTOCOL_ERROR),
    "ping of a wrong size": (frame(6, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
    "ping on a stream": (frame(6, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "goaway on a stream": (frame(7, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "goaway of a wrong size": (frame(7, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
    "window update of nothing": (frame(8, 0, 0, bytes(4)), ErrorCode.PROTOCOL_ERROR),
    "window update of a wrong size": (frame(8, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
    "window update on an idle stream": (frame(8, 0, 9, b"\0\0\0\1"), ErrorCode.PROTOCOL_ERROR),
    "window overflow": (frame(8, 0, 0, b"\x7f\xff\xff\xff"), ErrorCode.FLOW_CONTROL_ERROR),
    "window overflow by settings": (
        frame(8, 0, 1, b"\x7f\xff\0\0") + settings({4: 65535 * 3}),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "frame larger than agreed": (b"\xff\xff\xff\0\0\0\0\0\1", ErrorCode.FRAME_SIZE_ERROR),
    "padding longer than the frame": (frame(0, 8, 3, b"\x05abc"), ErrorCode.PROTOCOL_ERROR),
    "more data than the window": (frame(0, 0, 3, bytes(16384)) * 5, ErrorCode.FLOW_CONTROL_ERROR),
    "flood of pings": (frame(6, 0, 0, bytes(8)) * 60, ErrorCode.ENHANCE_YOUR_CALM),
    "flood of settings": (settings({}) * 60, ErrorCode.ENHANCE_YOUR_CALM),
    "flood of empty data": (frame(0, 0, 3) * 60, ErrorCode.ENHANCE_YOUR_CALM),
    "flood of unknown frames": (frame(0xEE, 0, 0) * 60, ErrorCode.ENHANCE_YOUR_CALM),
    "flood of refused calls": (
        b"".join(frame(1, 5, stream, b"\x88") for stream in range(5, 205, 2)),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
}


def code_of(said: bytes) -> ErrorCode:
    """The code of the GOAWAY that `said` ends with."""
    at = 0
    while at < len(said):
        size = int.from_bytes(said[at : at + 3], "big")
        if said[at + 3] == wire.GOAWAY:
            return ErrorCode(int.from_bytes(said[at + 13 : at + 17], "big"))
        at += 9 + size
    raise AssertionError("no GOAWAY")


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_ends_with_the_right_code_and_harms_only_itself(name: str) -> None:
    sent, code = VIOLATIONS[name]
    front = Front(SMALL)
    client, other = front.client(), front.client()
    beside = other.ask()
    await other.turn()
    whole, begun = client.ask(), client.head()
    await client.turn()
    assert (whole, begun) == (1, 3)
    client.connection.data_received(sent)
    assert code_of(client.cable.take()) is code
    assert client.cable.closed
    client.connection.data_received(b"anything")
    assert front.router.cancelled == [2]
    client.connection.connection_lost(None)
    front.router.answer()
    await other.turn()
    assert label(other.answers[beside]) == 1
    assert front.server.connections == 1
    assert front.service.bodies.held == 0


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        wire.PREFACE + frame(6, 0, 0, bytes(8)),
        wire.PREFACE + frame(4, 1, 0),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["HTTP/1.1", "no settings", "settings acknowledgement first", "TLS on a plain port"],
)
async def test_a_wrong_beginning_is_a_protocol_error(first: bytes) -> None:
    client = Front().client()
    client.connection.data_received(first)
    assert code_of(client.cable.take()) is ErrorCode.PROTOCOL_ERROR


async def test_a_preface_in_pieces() -> None:
    front = Front()
    client = front.client()
    client.ask()
    for byte in client.h2.data_to_send():
        client.connection.data_received(bytes([byte]))
    assert len(front.router.waiting) == 1


async def test_resets_in_a_row_end_the_connection_unless_calls_are_answered_too() -> None:
    front = Front(SMALL)
    client = front.client()
    for _ in range(5):
        client.h2.reset_stream(client.ask())
        await client.turn()
    client.tick()
    for _ in range(8):
        client.h2.reset_stream(client.ask())
        client.ask()
        await client.turn()
        front.router.answer_all()
        await client.turn()
    assert not client.ended
    for _ in range(20):
        if client.ended is None:
            client.h2.reset_stream(client.ask())
            await client.turn()
    assert client.ended is not None
    assert client.ended.error_code == ErrorCode.ENHANCE_YOUR_CALM
    assert not front.router.waiting


async def test_more_streams_than_allowed_are_refused_to_be_tried_again() -> None:
    front = Front(SMALL)
    client = front.client()
    await client.turn()
    assert client.h2.remote_settings.max_concurrent_streams == 4
    fields = (":method", "POST"), (":scheme", "http"), (":path", INFER), ("content-type", "application/grpc")
    block = b"".join(
        literal(name.encode(), value.encode()) for name, value in (*fields, ("x-api-key", PREDICT_ONLY))
    )
    for stream in range(1, 11, 2):
        client.connection.data_received(frame(1, 4, stream, block) + frame(0, 1, stream, prefixed(infer())))
    await asyncio.sleep(0)
    assert len(front.router.waiting) == 4
    assert client.cable.take() == wire.reset(9, ErrorCode.REFUSED_STREAM)


async def test_too_many_connections() -> None:
    front = Front(SMALL)
    clients = [front.client() for _ in range(3)]
    await clients[2].turn()
    assert clients[2].ended is not None
    clients[2].connection.connection_lost(None)
    answer = clients[0].ask()
    await clients[0].turn()
    front.router.answer()
    await clients[0].turn()
    assert label(clients[0].answers[answer]) == 1


async def test_a_client_that_says_nothing_is_sent_away() -> None:
    front = Front()
    client = Client(front)
    client.tick(11)
    assert code_of(client.cable.take()) is ErrorCode.SETTINGS_TIMEOUT


async def test_a_silent_client_is_asked_and_given_up() -> None:
    front = Front()
    silent, alive = front.client(), front.client()
    for client in (silent, alive):
        client.ask()
        await client.turn()
        client.tick(30)
    assert wire.frame(wire.PING, 0, 0, b"headrace") in silent.cable.take()
    await alive.turn()
    for client in (silent, alive):
        client.tick(21)
    assert silent.cable.closed
    assert not alive.cable.closed
    assert len(front.router.waiting) == 1
    idle = front.client()
    await idle.turn()
    idle.tick(10_000)
    assert not idle.cable.closed


async def test_draining_answers_what_is_open_and_what_crossed_the_news() -> None:
    front = Front()
    client, idle = front.client(), front.client()
    await idle.turn()
    client.ask()
    await client.turn()
    client.connection.drain()
    idle.connection.drain()
    client.ask()
    client.connection.data_received(client.h2.data_to_send())
    assert len(front.router.waiting) == 2
    await asyncio.sleep(0)
    news = client.cable.take()
    assert news.startswith(wire.goaway(wire.MAX_WINDOW, ErrorCode.NO_ERROR, "draining"))
    ping = news[news.index(b"\x00\x00\x08\x06") :][:17]
    for connection in (client.connection, idle.connection):
        connection.data_received(ping[:4] + b"\x01" + ping[5:])  # it was read
    client.connection.data_received(frame(1, 5, 5, b"\x88"))  # and who calls nevertheless is not heard
    await asyncio.sleep(0)
    assert idle.cable.closed
    assert client.cable.take() == wire.goaway(3, ErrorCode.NO_ERROR, "draining")
    front.router.answer()
    await asyncio.sleep(0)
    assert not client.cable.closed
    front.router.answer()
    await asyncio.sleep(0)
    assert client.cable.closed
    assert client.cable.take().count(b"grpc-status\x010") == 2


async def test_draining_does_not_wait_for_news_to_be_read() -> None:
    client = Front(RpcLimits(drain_notice_s=0.01)).client()
    await client.turn()
    client.connection.drain()
    await eventually(lambda: client.cable.closed)


async def test_a_shut_connection_tells_those_who_wait() -> None:
    front = Front()
    client = front.client()
    client.ask()
    await client.turn()
    client.connection.shut()
    said = client.cable.take()
    assert b"grpc-status\x0214" in said
    assert code_of(said) is ErrorCode.NO_ERROR
    assert front.router.cancelled == [1]


async def test_tasks_are_bounded_by_what_runs_and_not_by_who_says_nothing() -> None:
    methods, release = Methods(), asyncio.Event()

    async def echo(request: bytes, _context: object) -> bytes:
        await release.wait()
        return request

    async def echoes(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Echoes": grpc.stream_stream_rpc_method_handler(echoes),
    }
    methods.add_registered_method_handlers("a.B", _as_bytes(handlers))
    front = Front(RpcLimits(max_tasks=1, max_streaming_tasks=1), methods.by_path)
    client = front.client()
    silent = [client.head("/a.B/Echo") for _ in range(3)]
    streams = []
    for path in ("/a.B/Echo", "/a.B/Echo", "/a.B/Echoes", "/a.B/Echoes"):
        streams.append(client.head(path))
        client.send(streams[-1], prefixed(b"hello"), end=path == "/a.B/Echo")
    await client.turn()
    answers = [client.answers[stream] for stream in streams]
    assert [answer.status for answer in (answers[1], answers[3])] == [Code.CODE_RESOURCE_EXHAUSTED] * 2
    assert answers[2].message == b"hello"
    release.set()
    client.h2.reset_stream(streams[2])
    await client.turn(6)
    assert (answers[0].message, answers[0].status) == (b"hello", Code.CODE_OK)
    assert not any(client.answers[stream].ended for stream in silent)
    assert (front.server.tasks.calls, front.server.tasks.streaming) == (0, 0)
    client.connection.connection_lost(None)


def _as_bytes(handlers: dict[str, grpc.RpcMethodHandler]) -> dict[str, grpc.RpcMethodHandler]:  # type: ignore[type-arg]  # generic in the stubs only
    """Messages are bytes as they are."""
    return {
        name: handler._replace(request_deserializer=bytes, response_serializer=bytes)  # type: ignore[attr-defined]  # a named tuple, which the stubs do not say
        for name, handler in handlers.items()
    }
