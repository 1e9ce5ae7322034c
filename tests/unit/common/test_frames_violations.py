"""Bytes out of place end one connection with the right GOAWAY code, and nothing else."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable

import pytest
from headrace.v1.dataplane_pb2 import PredictRequest, ReplyFrame, RequestFrame
from headrace.v1.tensor_pb2 import Code
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.common.frames import FrameServer, Limits
from services.common.frames.wire import ErrorCode, frame, settings
from tests.fixtures.frames import (
    LOOPS,
    PREFACE,
    QUICK,
    Echoes,
    Wire,
    calling,
    message,
    run_on,
    serving,
)
from tests.fixtures.waiting import eventually

Running = tuple[FrameServer, str]
Loop = Callable[[], asyncio.AbstractEventLoop]

SMALL = Limits(
    handshake_s=0.3,
    linger_s=0.1,
    max_message_bytes=1 << 16,
    max_buffer_bytes=1 << 17,
    window_bytes=1 << 16,
    max_http2_frame_bytes=1 << 14,
    max_control_frames=50,
    max_in_flight=4,
    max_connections=8,
    ping_after_s=0.1,
    ping_timeout_s=0.1,
    unread_s=0.2,
    backoff_first_s=0.01,
    backoff_max_s=0.02,
)


@pytest.fixture
async def echoes() -> Echoes:
    return Echoes()


@pytest.fixture
async def server(echoes: Echoes) -> AsyncIterator[tuple[FrameServer, str]]:
    async with serving(echoes, SMALL) as pair:
        yield pair


def item(n: int = 1, version: str = "") -> bytes:
    return message(RequestFrame(items=[PredictRequest(id=n, version=version)]))


def big_endian(value: int) -> bytes:
    return value.to_bytes(4, "big")


VIOLATIONS = {
    "data on stream 0": (frame(0, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data on an idle stream": (frame(0, 0, 5, b"x"), ErrorCode.PROTOCOL_ERROR),
    "headers on stream 0": (frame(1, 4, 0), ErrorCode.PROTOCOL_ERROR),
    "headers on an even stream": (frame(1, 4, 2, b"\x88"), ErrorCode.PROTOCOL_ERROR),
    "headers in the middle of the stream": (frame(1, 4, 1, b"\x88"), ErrorCode.PROTOCOL_ERROR),
    "undecodable header block": (frame(1, 4, 3, b"\xff\xff\xff\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR),
    "endless header block": (frame(1, 0, 3) + frame(9, 0, 3, b"\0" * 16384) * 2, ErrorCode.ENHANCE_YOUR_CALM),
    "interrupted header block": (
        frame(1, 0, 3, b"\x88") + frame(6, 0, 0, b"12345678"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "continuation of another stream": (frame(1, 0, 3, b"\x88") + frame(9, 4, 5), ErrorCode.PROTOCOL_ERROR),
    "continuation without headers": (frame(9, 4, 1), ErrorCode.PROTOCOL_ERROR),
    "priority without a stream": (frame(2, 0, 0, b"12345"), ErrorCode.PROTOCOL_ERROR),
    "priority of a wrong size": (frame(2, 0, 1, b"123"), ErrorCode.FRAME_SIZE_ERROR),
    "reset of a wrong size": (frame(3, 0, 1, b"123"), ErrorCode.FRAME_SIZE_ERROR),
    "reset of an idle stream": (frame(3, 0, 7, b"1234"), ErrorCode.PROTOCOL_ERROR),
    "settings on a stream": (frame(4, 0, 1), ErrorCode.PROTOCOL_ERROR),
    "settings of a wrong size": (frame(4, 0, 0, b"12345"), ErrorCode.FRAME_SIZE_ERROR),
    "settings acknowledgement with a payload": (frame(4, 1, 0, b"123456"), ErrorCode.FRAME_SIZE_ERROR),
    "window too large": (settings({4: 1 << 31}), ErrorCode.FLOW_CONTROL_ERROR),
    "frame size too small": (settings({5: 100}), ErrorCode.PROTOCOL_ERROR),
    "frame size too large": (settings({5: 1 << 24}), ErrorCode.PROTOCOL_ERROR),
    "push neither on nor off": (settings({2: 2}), ErrorCode.PROTOCOL_ERROR),
    "push promise": (frame(5, 4, 1, b"\0\0\0\2"), ErrorCode.PROTOCOL_ERROR),
    "ping of a wrong size": (frame(6, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
    "ping on a stream": (frame(6, 0, 1, b"12345678"), ErrorCode.PROTOCOL_ERROR),
    "goaway on a stream": (frame(7, 0, 1, b"12345678"), ErrorCode.PROTOCOL_ERROR),
    "goaway of a wrong size": (frame(7, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
    "window update of nothing": (frame(8, 0, 0, big_endian(0)), ErrorCode.PROTOCOL_ERROR),
    "stream window update of nothing": (frame(8, 0, 1, big_endian(0)), ErrorCode.PROTOCOL_ERROR),
    "window update of a wrong size": (frame(8, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
    "window update on an idle stream": (frame(8, 0, 9, big_endian(1)), ErrorCode.PROTOCOL_ERROR),
    "connection window overflow": (frame(8, 0, 0, big_endian((1 << 31) - 1)), ErrorCode.FLOW_CONTROL_ERROR),
    "stream window overflow": (frame(8, 0, 1, big_endian((1 << 31) - 1)), ErrorCode.FLOW_CONTROL_ERROR),
    "window overflow by settings": (
        frame(8, 0, 1, big_endian((1 << 31) - 65536)) + settings({4: 65536 * 2}),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "frame larger than agreed": (b"\xff\xff\xff\0\0\0\0\0\1", ErrorCode.FRAME_SIZE_ERROR),
    "padding longer than the frame": (frame(0, 8, 1, b"\x05abc"), ErrorCode.PROTOCOL_ERROR),
    "padded without a length": (frame(0, 8, 1), ErrorCode.FRAME_SIZE_ERROR),
    "more data than the window": (
        frame(0, 0, 1, b"\0" + b"\0\1\0\0" + b"a" * 16379) * 5,
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "end inside a message": (frame(0, 1, 1, b"\0\0\0\0\x09abc"), ErrorCode.PROTOCOL_ERROR),
    "message prefix not gRPC's": (frame(0, 0, 1, b"\x07\0\0\0\0"), ErrorCode.PROTOCOL_ERROR),
    "flood of pings": (frame(6, 0, 0, b"12345678") * 60, ErrorCode.ENHANCE_YOUR_CALM),
    "flood of settings": (settings({}) * 60, ErrorCode.ENHANCE_YOUR_CALM),
    "flood of empty data": (frame(0, 0, 1) * 60, ErrorCode.ENHANCE_YOUR_CALM),
    "flood of unknown frames": (frame(0xEE, 0, 0) * 60, ErrorCode.ENHANCE_YOUR_CALM),
    "the same item twice": (frame(0, 0, 1, item(1, "hold")) * 2, ErrorCode.PROTOCOL_ERROR),
}


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_ends_with_the_right_code_and_harms_only_itself(server: Running, name: str) -> None:
    sent, code = VIOLATIONS[name]
    async with calling(server[1], SMALL) as other:
        raw = await Wire.connect(server[1])
        await raw.open()
        await raw.send(sent)
        assert await raw.goaway() is code
        assert await raw.closed()
        raw.close()
        assert (await other.predict(PredictRequest(version="fine"), None)).version == "fine"


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        PREFACE + frame(6, 0, 0, b"12345678"),
        PREFACE + frame(4, 1, 0),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["HTTP/1.1", "no settings", "settings acknowledgement first", "TLS on a plain port"],
)
async def test_a_wrong_beginning_is_a_protocol_error(server: Running, first: bytes) -> None:
    raw = await Wire.connect(server[1])
    await raw.send(first)
    assert await raw.goaway() is ErrorCode.PROTOCOL_ERROR
    assert await raw.closed()
    raw.close()


class TestRefusals:
    """What is well formed but not wanted gets a status, not a protocol error."""

    @pytest.mark.parametrize(
        ("changed", "expected"),
        [
            ({":path": "/headrace.v1.DataPlane/Other"}, {"grpc-status": "12"}),
            ({"authorization": "Bearer wrong"}, {"grpc-status": "16"}),
            ({"authorization": ""}, {"grpc-status": "16"}),
            ({"authorization": "Bearer ünïcode"}, {"grpc-status": "16"}),
            ({"grpc-encoding": "gzip"}, {"grpc-status": "12"}),
            ({":method": "GET"}, {":status": "405"}),
            ({"content-type": "text/plain"}, {":status": "415"}),
        ],
    )
    async def test_headers(self, server: Running, changed: dict[str, str], expected: dict[str, str]) -> None:
        raw = await Wire.connect(server[1])
        await raw.open(changed)
        flags, _, _ = await raw.until(1)
        assert flags & 1
        assert expected.items() <= raw.headers.items()
        assert await raw.goaway() is ErrorCode.NO_ERROR
        raw.close()

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (message(b"", flag=1), Code.CODE_INTERNAL),
            (b"\0\xff\xff\xff\xff", Code.CODE_RESOURCE_EXHAUSTED),
            (message(b"\xff\xff"), Code.CODE_INVALID_ARGUMENT),
        ],
        ids=["compressed", "lies about its length", "no protobuf"],
    )
    async def test_messages(self, server: Running, sent: bytes, status: Code) -> None:
        raw = await Wire.connect(server[1])
        await raw.open()
        await raw.until(0)
        await raw.send(frame(0, 0, 1, sent))
        await raw.until(1)
        assert raw.headers["grpc-status"] == str(int(status))
        raw.close()

    async def test_malformed_header_names(self, server: Running) -> None:
        raw = await Wire.connect(server[1])
        await raw.open({"Upper": "case"})
        _, _, payload = await raw.until(3)
        assert int.from_bytes(payload, "big") == ErrorCode.PROTOCOL_ERROR
        raw.close()

    async def test_no_hello_in_time(self, server: Running) -> None:
        raw = await Wire.connect(server[1])
        await raw.send(PREFACE + settings({}))
        assert await raw.goaway() is ErrorCode.SETTINGS_TIMEOUT
        assert await raw.closed()
        raw.close()

    async def test_too_many_connections(self, server: Running) -> None:
        held = [await Wire.connect(server[1]) for _ in range(8)]
        for raw in held:
            await raw.open()
            await raw.until(0)
        extra = await Wire.connect(server[1])
        assert await extra.goaway() is ErrorCode.ENHANCE_YOUR_CALM
        for raw in [*held, extra]:
            raw.close()


class TestAllowed:
    """What the protocol allows is taken, however unusual."""

    async def replies(self, raw: Wire, count: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < count:
            _, _, payload = await raw.until(0)
            ids += [reply.id for reply in ReplyFrame.FromString(payload[5:]).items]
        return ids

    async def test_every_byte_alone(self, server: Running) -> None:
        raw = await Wire.connect(server[1])
        sent = (
            PREFACE
            + settings({})
            + frame(1, 4, 1, raw.request_headers())
            + frame(0, 0, 1, raw.hello())
            + frame(0, 0, 1, item(7))
        )
        for at in range(len(sent)):
            await raw.send(sent[at : at + 1])
            await asyncio.sleep(0)
        assert await self.replies(raw, 1) == [7]
        raw.close()

    async def test_padding_priority_continuation_unknown_frames(self, server: Running) -> None:
        raw = await Wire.connect(server[1])
        block = raw.request_headers()
        hello = raw.hello()
        await raw.send(
            PREFACE
            + settings({0xFF: 5, 3: 100})
            + frame(1, 0x8 | 0x20, 1, b"\x03" + b"\0\0\0\0\x10" + block[:10] + b"\0\0\0")
            + frame(9, 0, 1, block[10:20])
            + frame(9, 4, 1, block[20:])
            + frame(0xB, 0, 0, b"unknown")
            + frame(2, 0, 1, b"\0\0\0\0\x05")
            + frame(0, 8, 1, b"\x02" + hello[:3] + b"\0\0")
            + frame(0, 0, 1)
            + frame(0, 8, 1, b"\x00" + hello[3:] + item(1) + item(2)[:4])
            + frame(0, 0, 1, item(2)[4:] + item(3))
        )
        assert await self.replies(raw, 3) == [1, 2, 3]
        raw.close()

    async def test_ping_is_answered_with_its_own_bytes(self, server: Running) -> None:
        raw = await Wire.connect(server[1])
        await raw.open()
        await raw.send(frame(6, 0, 0, b"abcdefgh"))
        _, _, payload = await raw.until(6, ack=True)
        assert payload == b"abcdefgh"
        raw.close()

    async def test_a_second_stream_is_refused_and_the_first_goes_on(self, server: Running) -> None:
        raw = await Wire.connect(server[1])
        await raw.open()
        await raw.until(0)
        await raw.send(frame(1, 4, 3, raw.request_headers()) + frame(0, 0, 3, item(1)))
        _, stream_id, payload = await raw.until(3)
        assert (stream_id, int.from_bytes(payload, "big")) == (3, ErrorCode.REFUSED_STREAM)
        await raw.send(frame(0, 0, 1, item(9)))
        assert await self.replies(raw, 1) == [9]
        raw.close()

    async def test_replies_wait_for_the_window_and_follow_its_changes(self, echoes: Echoes) -> None:
        async with serving(echoes, QUICK) as (_, address):
            raw = await Wire.connect(address)
            await raw.send(
                PREFACE
                + settings({4: 40})
                + frame(1, 4, 1, raw.request_headers())
                + frame(0, 0, 1, raw.hello())
            )
            got = b""
            want = PredictRequest(id=1, version="v" * 1000)
            await raw.send(frame(0, 0, 1, message(RequestFrame(items=[want]))))
            while len(got) < 40:
                got += (await raw.until(0))[2]
            assert len(got) == 40
            await raw.send(settings({4: 140}))
            while len(got) < 140:
                got += (await raw.until(0))[2]
            assert len(got) == 140
            await raw.send(settings({4: 10}) + frame(8, 0, 1, big_endian(5000)))
            while len(got) < 1000:
                got += (await raw.until(0))[2]
            size = int.from_bytes(got[1:5], "big")
            rest = ReplyFrame.FromString(got[5 + size + 5 :])
            assert rest.items[0].version == "v" * 1000
            raw.close()

    async def test_half_closed_clients_get_their_answers_then_ok(
        self, server: Running, echoes: Echoes
    ) -> None:
        raw = await Wire.connect(server[1])
        await raw.open()
        await raw.until(0)
        await raw.send(frame(0, 1, 1, item(1, "hold")))
        await eventually(lambda: echoes.made and echoes.made[-1].held)
        echoes.made[-1].release()
        assert await self.replies(raw, 1) == [1]
        await raw.until(1)
        assert raw.headers["grpc-status"] == "0"
        raw.close()

    async def test_items_beyond_the_limit_are_refused_one_by_one(
        self, server: Running, echoes: Echoes
    ) -> None:
        raw = await Wire.connect(server[1])
        await raw.open()
        await raw.until(0)
        items = [PredictRequest(id=n, version="hold") for n in range(1, 7)]
        await raw.send(frame(0, 0, 1, message(RequestFrame(items=items))))
        _, _, payload = await raw.until(0)
        refused = ReplyFrame.FromString(payload[5:]).items
        assert [(reply.id, reply.code) for reply in refused] == [
            (5, Code.CODE_RESOURCE_EXHAUSTED),
            (6, Code.CODE_RESOURCE_EXHAUSTED),
        ]
        assert len(echoes.made[-1].held) == 4
        raw.close()

    async def test_a_silent_peer_is_asked_and_then_left(self, server: Running, echoes: Echoes) -> None:
        raw = await Wire.connect(server[1])
        await raw.open()
        await raw.until(0)
        await raw.send(frame(0, 0, 1, item(1, "hold")))
        _, _, payload = await raw.until(6, ack=False)
        assert len(payload) == 8
        assert await raw.closed()
        assert echoes.made[-1].closed == 1
        raw.close()

    async def test_an_answering_peer_may_wait_long(self, server: Running, echoes: Echoes) -> None:
        raw = await Wire.connect(server[1])
        await raw.open()
        await raw.until(0)
        await raw.send(frame(0, 0, 1, item(1, "hold")))
        for _ in range(3):
            _, _, payload = await raw.until(6, ack=False)
            await raw.send(frame(6, 1, 0, payload))
        echoes.made[-1].release()
        assert await self.replies(raw, 1) == [1]
        raw.close()

    async def test_a_client_that_reads_nothing_is_bounded(self, echoes: Echoes) -> None:
        limits = Limits(
            max_message_bytes=1 << 20,
            max_buffer_bytes=1 << 20,
            linger_s=0.1,
            ping_after_s=0.2,
            ping_timeout_s=0.2,
            unread_s=0.4,
        )
        async with serving(echoes, limits) as (server, address):
            raw = await Wire.connect(address)
            await raw.open()
            big = "v" * 60_000
            try:
                for n in range(1, 200):
                    body = message(RequestFrame(items=[PredictRequest(id=n, version=big)]))
                    for at in range(0, len(body), 16_384):
                        await raw.send(frame(0, 0, 1, body[at : at + 16_384]))
            except ConnectionError:
                pass
            await eventually(lambda: not server.connections)
            raw.close()


class TestGarbage:
    """Random bytes: the connection ends, no exception escapes, no task stays, others are served."""

    @staticmethod
    async def survive(attempts: list[bytes]) -> None:
        failures: list[dict[str, object]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context))
        before = asyncio.all_tasks()
        async with serving(Echoes(), SMALL) as (server, address):
            for attempt in attempts:
                raw = await Wire.connect(address)
                try:
                    await raw.send(attempt)
                    raw._writer.write_eof()
                except ConnectionError:
                    pass
                assert await raw.closed()
                raw.close()
            async with calling(address, SMALL) as calls:
                assert (await calls.predict(PredictRequest(version="fine"), None)).version == "fine"
            await eventually(lambda: not server.connections)
        assert asyncio.all_tasks() == before
        gc.collect()
        assert failures == []

    @hypothesis_settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(LOOPS), st.lists(st.binary(max_size=200), min_size=1, max_size=3))
    def test_raw_bytes(self, loop: Loop, attempts: list[bytes]) -> None:
        run_on(loop, self.survive(attempts))

    @hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(LOOPS),
        st.lists(
            st.tuples(
                st.integers(0, 11),
                st.integers(0, 255),
                st.sampled_from([0, 0, 1, 1, 1, 2, 3, 1 << 30]),
                st.one_of(st.binary(max_size=40), st.binary(max_size=20).map(message), st.just(item(1))),
            ),
            max_size=12,
        ),
        st.binary(max_size=12),
    )
    def test_frames_after_a_good_beginning(
        self, loop: Loop, frames: list[tuple[int, int, int, bytes]], tail: bytes
    ) -> None:
        headers = frame(1, 4, 1, Wire.request_headers())
        hello = frame(0, 0, 1, Wire.hello())
        sent = b"".join(frame(kind, flags, sid, payload) for kind, flags, sid, payload in frames)
        run_on(loop, self.survive([PREFACE + settings({}) + headers + hello + sent + tail]))
