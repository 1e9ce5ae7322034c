"""Whatever arrives in whatever pieces, a connection neither crashes nor answers out of turn."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.gateway.test_gateway_connection import BODY, HEAD, Connection

LIVE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = HEAD.replace(b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked")

#: Requests as they come over one connection, and the status that each gets (None: the last one, any refusal).
GOOD: list[tuple[bytes, bytes]] = [
    (HEAD + BODY, b"200"),
    (LIVE, b"204"),
    (HEAD.replace(b"%d" % len(BODY), b"1") + b"{", b"400"),
    (CHUNKED + b"5\r\n" + BODY[:5] + b"\r\n%x\r\n" % (len(BODY) - 5) + BODY[5:] + b"\r\n0\r\n\r\n", b"200"),
    (HEAD[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + BODY, b"200"),
    (HEAD[:-2] + b"Expect: 100-continue\r\n\r\n" + BODY, b"200"),
]
BAD = [
    b"nonsense\r\n\r\n",
    HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n" + BODY,
    HEAD[:-2] + b"Host: b\r\n\r\n" + BODY,
    CHUNKED + b"zz\r\n",
    HEAD.replace(b"Content-Length: %d" % len(BODY), b"Content-Length: 99999") + BODY,
    b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /x HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
]


async def settle(connection: Connection, *, answer: bool) -> None:
    for _ in range(60):
        await asyncio.sleep(0)
        if answer and connection.channel.waiting:
            connection.channel.answer()


def statuses(connection: Connection) -> list[bytes]:
    return [status for status in connection.statuses() if status != b"100"]


@settings(max_examples=50, deadline=None)
@given(
    requests=st.lists(st.sampled_from(GOOD), max_size=6),
    bad=st.sampled_from([b"", *BAD]),
    cuts=st.lists(st.integers(0, 2000), max_size=12),
    prompt=st.lists(st.booleans(), max_size=12),
)
def test_answers_come_once_and_in_order(
    requests: list[tuple[bytes, bytes]], bad: bytes, cuts: list[int], prompt: list[bool]
) -> None:
    async def scenario() -> None:
        connection = Connection()
        data = b"".join(raw for raw, _status in requests) + bad
        edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
        pace = deque(prompt)
        for begin, end in pairwise(edges):
            connection.feed(data[begin:end])
            await settle(connection, answer=bool(pace.popleft() if pace else True))
        await settle(connection, answer=True)
        expected = [status for _raw, status in requests]
        found = statuses(connection)
        assert found[: len(expected)] == expected
        refused = found[len(expected) :]
        if bad:
            assert len(refused) == 1
            assert refused[0][:1] == b"4"
        else:
            assert refused == []
            assert not connection.transport.closed
            connection.feed(LIVE)
            await settle(connection, answer=True)
            assert statuses(connection) == [*expected, b"204"]

    asyncio.run(scenario())


@settings(max_examples=50, deadline=None)
@given(pieces=st.lists(st.binary(max_size=60) | st.sampled_from([HEAD, BODY, LIVE, *BAD]), max_size=8))
def test_no_bytes_crash_a_connection(pieces: list[bytes]) -> None:
    async def scenario() -> None:
        connection = Connection()
        for piece in pieces:
            if connection.transport.closed:
                break
            connection.feed(piece)
            connection.ticks(2)
            await settle(connection, answer=True)
        connection.ticks(200)
        await settle(connection, answer=True)
        connection.ticks(40)
        assert connection.transport.closed
        connection.protocol.connection_lost(None)
        assert connection.channel.waiting == {}

    asyncio.run(scenario())
