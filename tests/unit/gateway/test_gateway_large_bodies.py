"""Bodies that are read in place, on a transport in memory: the same answers however they come, and all bounds
hold."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.common.frames.in_place import IN_PLACE_BYTES, MOST_IN_PLACE, InPlace
from tests.unit.gateway.test_gateway_connection import BODY, HEAD, Connection
from tests.unit.gateway.test_gateway_connection_fuzz import settle, statuses

LONG = IN_PLACE_BYTES
LIVE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


def asked(size: int, *, more: bytes = b"") -> bytes:
    """A request whose body is so long."""
    body = BODY + b" " * (size - len(BODY) - 1) + b"\n"
    length = b"Content-Length: %d" % len(body)
    return HEAD.replace(b"Content-Length: %d" % len(BODY), length)[:-2] + more + b"\r\n" + body


def large(**bounds: int) -> Connection:
    return Connection(
        inline_bytes=1 << 30, **{"max_body_bytes": 16 << 20, "max_held_bytes": 32 << 20, **bounds}
    )


#: What each is answered with.
REQUESTS = {
    "short": (HEAD + BODY, b"200"),
    "asgi": (LIVE, b"204"),
    "long": (asked(2 * LONG), b"200"),
    "longer": (asked(5 * LONG), b"200"),
    "expects": (asked(2 * LONG, more=b"Expect: 100-continue\r\n"), b"200"),
    "no JSON": (asked(3 * LONG)[:-1] + b"x", b"400"),
    "long asgi": (asked(2 * LONG).replace(b"/v1/predict", b"/elsewhere"), b"204"),
    "upgrades": (asked(3 * LONG, more=b"Connection: Upgrade\r\nUpgrade: h2c\r\n"), b"200"),
}


@given(
    st.lists(st.sampled_from(sorted(REQUESTS)), min_size=1, max_size=5),
    st.lists(st.one_of(st.integers(0, 2000), st.integers(0, 20 * LONG)), max_size=10),
    st.lists(st.booleans(), max_size=10),
)
@example(["longer", "longer", "short", "longer"], [LONG, 7 * LONG], [])
@example(["expects", "no JSON", "long asgi", "long"], [LONG, 3 * LONG], [])
@settings(max_examples=50, deadline=None)
def test_answers_are_the_same_however_a_body_is_split(
    names: list[str], cuts: list[int], prompt: list[bool]
) -> None:
    async def scenario() -> None:
        connection = large()
        requests = [REQUESTS[name] for name in names]
        data = b"".join(raw for raw, _status in requests)
        edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
        for number, (begin, end) in enumerate(pairwise(edges)):
            connection.feed(data[begin:end])
            await settle(connection, answer=number >= len(prompt) or prompt[number])
        await settle(connection, answer=True)
        expected = [status for _raw, status in requests]
        assert statuses(connection) == expected
        assert connection.front.service.bodies.held == 0
        connection.feed(HEAD + BODY)
        await settle(connection, answer=True)
        assert statuses(connection) == [*expected, b"200"]

    asyncio.run(scenario())


async def test_a_large_body_is_read_in_place_and_a_short_request_ends_that() -> None:
    connection = large()
    raw = asked(4 * LONG)
    for _ in range(3):
        connection.feed(raw[:LONG])
        assert isinstance(connection.transport.get_protocol(), InPlace)
        connection.feed(raw[LONG:])
        connection.channel.answer()
    assert connection.transport.switches == 1
    connection.feed(HEAD + BODY)
    assert connection.transport.get_protocol() is connection.protocol
    connection.channel.answer()
    assert connection.statuses() == [b"200"] * 4


async def test_one_that_is_announced_as_too_long_takes_no_memory_before_it_comes() -> None:
    connection = large()
    connection.feed(asked(MOST_IN_PLACE + 1)[:LONG])
    assert connection.transport.switches == 0
    connection.feed(asked(MOST_IN_PLACE + 1)[LONG:])
    connection.channel.answer()
    assert connection.statuses() == [b"200"]


async def test_one_that_trickles_is_answered_408_and_its_rest_thrown_away() -> None:
    connection = large()
    raw = asked(2 * LONG)
    connection.feed(raw[:1000])
    for index in range(1000, 1031):
        connection.feed(raw[index : index + 1])
        connection.ticks(1)
    assert connection.statuses() == [b"408"]
    assert not connection.transport.closed
    connection.feed(raw[1031:-1])
    assert not connection.transport.closed
    connection.feed(raw[-1:] + HEAD + BODY)
    assert connection.transport.closed
    assert connection.statuses() == [b"408"]
    assert not connection.channel.waiting


async def test_its_bytes_are_counted_as_they_come() -> None:
    connection = large(max_held_bytes=3 * LONG)
    budget = connection.front.service.bodies
    raw = asked(5 * LONG)
    connection.feed(raw[:LONG])
    held = budget.held
    connection.feed(raw[LONG : 2 * LONG])
    assert budget.held == held + LONG
    connection.feed(raw[2 * LONG :])  # in one piece, no bound is passed
    connection.channel.answer()
    assert connection.statuses() == [b"200"]
    assert budget.held == 0
    for at in range(0, len(raw), LONG):
        connection.feed(raw[at : at + LONG])
    assert connection.statuses() == [b"200", b"503"]
    assert budget.held == 0


@pytest.mark.parametrize("answered", [False, True])
async def test_a_client_that_leaves_inside_of_a_body_leaves_nothing(answered: bool) -> None:
    connection = large()
    raw = asked(4 * LONG)
    if answered:
        connection.feed(raw)
        connection.channel.answer()
    connection.feed(raw[: 2 * LONG])
    in_place = connection.transport.get_protocol()
    assert isinstance(in_place, InPlace)
    assert in_place.eof_received() is False
    in_place.connection_lost(None)
    assert connection.front.service.bodies.held == 0
    assert connection.protocol.room() is None
    assert not connection.channel.waiting


async def test_a_body_over_http_1_0_is_read_in_pieces() -> None:
    connection = large()
    raw = asked(2 * LONG).replace(b"HTTP/1.1", b"HTTP/1.0")
    connection.feed(raw[:1000])
    assert connection.transport.switches == 0
    connection.feed(raw[1000:])
    connection.channel.answer()
    assert connection.statuses() == [b"200"]
    assert connection.transport.closed
