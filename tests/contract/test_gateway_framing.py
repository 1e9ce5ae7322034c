"""Where one message ends and the next begins, on both fronts: bytes that two HTTP implementations may read
differently (request smuggling, RFC 9112 sections 6 and 11.2) end the connection with one refusal, and what
follows them is never taken for a request. And bytes at random: no hang, no crash, no answer too many."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures.gateway import PREDICT_ONLY, GatewayThread
from tests.fixtures.waiting import PATIENCE_S

BODY = json.dumps({"model": "cancer", "inputs": [[10.0, 2.0, 3.0]]}).encode()
KEY = b"X-API-Key: " + PREDICT_ONLY.encode()
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
#: The second request on the connection: an answer to it, after a refusal, is a smuggled one.
CANARY = b"GET /health/live HTTP/1.1\r\nHost: canary\r\n\r\n"
LIVE = b"200"


@pytest.fixture(scope="module", params=["hot", "asgi"])
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayThread]:
    state = tmp_path_factory.mktemp(f"gateway-{request.param}")
    with GatewayThread(state, hot=request.param == "hot", max_body_bytes=1 << 20) as running:
        yield running


def message(*lines: bytes, body: bytes = BODY, start: bytes = b"POST /v1/predict HTTP/1.1") -> bytes:
    """A request whose framing is what `lines` say."""
    return b"\r\n".join([start, b"Host: gateway", KEY, *lines]) + b"\r\n\r\n" + body


def statuses(received: bytes) -> list[bytes]:
    """Of the final answers in what came back."""
    found = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    return [status for status in found if status != b"100"]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(message(LENGTH, CHUNKED, body=CHUNKS), id="cl-te"),
        pytest.param(message(CHUNKED, LENGTH, body=CHUNKS), id="te-cl"),
        pytest.param(message(CHUNKED, b"Transfer-Encoding: identity", body=CHUNKS), id="te-te"),
        pytest.param(message(b"Transfer-Encoding: identity", LENGTH), id="identity-with-length"),
        pytest.param(message(b"Transfer-Encoding: gzip", LENGTH), id="te-without-chunked"),
        pytest.param(message(b"Transfer-Encoding: identity"), id="identity"),
        pytest.param(message(b"Transfer-Encoding: gzip"), id="gzip"),
        pytest.param(message(b"Transfer-Encoding:", body=CHUNKS), id="no-coding"),
        pytest.param(message(b"Transfer-Encoding: chunked, chunked", body=CHUNKS), id="chunked-twice"),
        pytest.param(message(CHUNKED, CHUNKED, body=CHUNKS), id="chunked-in-two-headers"),
        pytest.param(message(CHUNKED, b"Transfer-Encoding: gzip", body=CHUNKS), id="chunked-then-gzip"),
        pytest.param(message(b"Transfer-Encoding: chunked;q=1", body=CHUNKS), id="chunked-with-parameter"),
        pytest.param(message(b"Transfer-Encoding: chunked\t", body=CHUNKS), id="tab-behind"),
        pytest.param(message(b'Transfer-Encoding: "chunked"', body=CHUNKS), id="quoted"),
        pytest.param(message(b"Transfer-Encoding:\x0bchunked", body=CHUNKS), id="vertical-tab"),
        pytest.param(message(b"Transfer-Encoding: chun\xadked", body=CHUNKS), id="soft-hyphen"),
        pytest.param(message(b" Transfer-Encoding: chunked", LENGTH), id="space-before-name"),
        pytest.param(message(b"Transfer-Encoding\t: chunked", LENGTH), id="tab-before-colon"),
        pytest.param(message(b"X: y\r\n\tTransfer-Encoding: chunked", LENGTH), id="fold"),
        pytest.param(message(b"Content-Length: 0", LENGTH), id="two-different-lengths"),
        pytest.param(message(LENGTH, LENGTH), id="two-equal-lengths"),
        pytest.param(message(b"Content-Length: 5 5"), id="length-with-space"),
        pytest.param(message(b"Content-Length: 0x10"), id="hexadecimal-length"),
        pytest.param(message(b"Content-Length: 1_0"), id="underscore-length"),
        pytest.param(message(b"Content-Length: \xd9\xa1\xd9\xa0"), id="arabic-digits"),
        pytest.param(message(b"Content-Length: 99999999999999999999999"), id="length-overflow"),
        pytest.param(message(b"Content-Length:"), id="empty-length"),
        pytest.param(message(CHUNKED, body=b"0x5\r\nhello\r\n0\r\n\r\n"), id="chunk-size-0x"),
        pytest.param(message(CHUNKED, body=b"-5\r\nhello\r\n0\r\n\r\n"), id="negative-chunk"),
        pytest.param(message(CHUNKED, body=b" 5\r\nhello\r\n0\r\n\r\n"), id="space-before-chunk"),
        pytest.param(message(CHUNKED, body=b"\r\nhello\r\n0\r\n\r\n"), id="no-chunk-size"),
        pytest.param(message(CHUNKED, body=b"5\nhello\n0\n\n"), id="chunks-by-bare-lf"),
        pytest.param(message(CHUNKED, body=b"5;a=\nb\r\nhello\r\n0\r\n\r\n"), id="lf-in-extension"),
        pytest.param(message(CHUNKED, body=b"5\rXhello\r\n0\r\n\r\n"), id="cr-without-lf"),
        pytest.param(message(CHUNKED, body=b"5\r\nhelloXX0\r\n\r\n"), id="chunk-longer-than-said"),
        pytest.param(message(CHUNKED, body=b"10000000000000000\r\n"), id="chunk-size-overflow"),
        pytest.param(
            message(CHUNKED, body=CHUNKS[:-2] + b"Content-Length: 400\r\n\r\n"), id="length-in-trailers"
        ),
        pytest.param(message(b"No colon here", LENGTH), id="no-colon"),
        pytest.param(message(b": value", LENGTH), id="empty-name"),
        pytest.param(message(b"X y: z", LENGTH), id="space-in-name"),
        pytest.param(message(b"X-A: a\nTransfer-Encoding: chunked", LENGTH), id="bare-lf-in-head"),
        pytest.param(message(b"X-A: a\rTransfer-Encoding: chunked", LENGTH), id="bare-cr-in-head"),
        pytest.param(message(LENGTH, start=b"POST /v1/predict HTTP/1.1 "), id="space-after-version"),
        pytest.param(message(LENGTH, start=b"POST /v1/pre dict HTTP/1.1"), id="space-in-target"),
        pytest.param(message(LENGTH, start=b"POST /v1/predict HTTP/1.1\x00"), id="nul-after-version"),
        pytest.param(message(LENGTH, start=b"PO\x00ST /v1/predict HTTP/1.1"), id="nul-in-method"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="http2-preface"),
    ],
)
def test_what_may_be_read_in_two_ways_ends_the_connection(gateway: GatewayThread, raw: bytes) -> None:
    before = len(gateway.running.router.requests)
    received = gateway.raw(raw + CANARY)
    assert [status[:1] for status in statuses(received)] == [b"4"], received
    assert b"connection: close\r\n" in received.lower()
    assert not received.endswith(b"<open>")
    assert len(gateway.running.router.requests) <= before


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        pytest.param(message(CHUNKED, body=CHUNKS), b"200", id="chunked"),
        pytest.param(message(b"transfer-encoding:chunked", body=CHUNKS), b"200", id="no-space"),
        pytest.param(message(b"Transfer-Encoding:  chunked", body=CHUNKS), b"200", id="two-spaces"),
        pytest.param(message(b"Transfer-Encoding: CHUNKED", body=CHUNKS), b"200", id="capitals"),
        pytest.param(message(b"Transfer-Encoding: Chunked", body=CHUNKS), b"200", id="capital"),
        pytest.param(message(b"Transfer-Encoding: chunked  ", body=CHUNKS), b"200", id="space-behind"),
        pytest.param(
            message(CHUNKED, body=b"%x;name=value\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)),
            b"200",
            id="extension",
        ),
        pytest.param(
            message(CHUNKED, body=b"%s\r\n%s\r\n000\r\n\r\n" % (b"%08X" % len(BODY), BODY)),
            b"200",
            id="zeros",
        ),
        pytest.param(
            message(CHUNKED, body=CHUNKS[:-2] + b"X-API-Key: other\r\nHost: other\r\n\r\n"),
            b"200",
            id="trailers-are-no-headers",
        ),
        pytest.param(message(b"Content-Length: 00%d" % len(BODY)), b"200", id="length-with-zeros"),
        pytest.param(b"\r\n\r\n" + message(LENGTH), b"200", id="empty-lines-first"),
        pytest.param(message(LENGTH, start=b"POST http://other/v1/predict HTTP/1.1"), b"200", id="absolute"),
        pytest.param(
            b"GET /health/live HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(CANARY), CANARY),
            LIVE,
            id="a-body-is-no-request",
        ),
        pytest.param(
            message(LENGTH, start=b"POST /v1/no-such-thing HTTP/1.1"), b"404", id="body-of-an-unknown-path"
        ),
    ],
)
def test_what_is_read_in_one_way_keeps_the_connection(
    gateway: GatewayThread, raw: bytes, status: bytes
) -> None:
    received = gateway.raw(raw + CANARY, stays=2)
    assert statuses(received) == [status, LIVE], received
    assert received.endswith(b"<open>")


@pytest.mark.parametrize(
    "codings",
    [
        pytest.param([b"gzip, chunked"], id="gzip"),
        pytest.param([b"gzip,chunked"], id="no-space"),
        pytest.param([b"identity, chunked"], id="identity"),
        pytest.param([b", chunked"], id="empty-element"),
        pytest.param([b"x;a=chunked, chunked"], id="parameter"),
        pytest.param([b"gzip", b"chunked"], id="two-headers"),
    ],
)
@pytest.mark.parametrize("path", [b"/v1/predict", b"/v1/no-such-thing"])
def test_transfer_codings_that_nobody_here_undoes(
    gateway: GatewayThread, codings: list[bytes], path: bytes
) -> None:
    before = len(gateway.running.router.requests)
    lines = [b"Transfer-Encoding: " + coding for coding in codings]
    received = gateway.raw(message(*lines, body=CHUNKS, start=b"POST %s HTTP/1.1" % path) + CANARY)
    assert statuses(received) == [b"501"], received
    assert b"connection: close\r\n" in received.lower()
    assert not received.endswith(b"<open>")
    assert len(gateway.running.router.requests) == before


@pytest.mark.parametrize("more", [(), (b"Connection: keep-alive",)])
def test_chunks_in_http_1_0_are_the_last_of_their_connection(
    gateway: GatewayThread, more: tuple[bytes, ...]
) -> None:
    """Whoever passed them on may have known nothing of chunks (RFC 9112, 6.1)."""
    raw = message(CHUNKED, *more, body=CHUNKS, start=b"POST /v1/predict HTTP/1.0")
    received = gateway.raw(raw + CANARY)
    assert statuses(received) == [b"200"]
    assert not received.endswith(b"<open>")


def test_a_refused_body_is_not_the_next_request(gateway: GatewayThread) -> None:
    smuggled = message(LENGTH)
    raw = message(b"Content-Length: %d" % len(smuggled), body=smuggled).replace(KEY, b"X-API-Key: no")
    received = gateway.raw(raw + CANARY, stays=1)
    assert statuses(received)[0] == b"401"
    assert set(statuses(received)[1:]) <= {LIVE}


PIECES = st.one_of(
    st.sampled_from(
        [
            message(LENGTH),
            message(CHUNKED, body=CHUNKS),
            message(LENGTH)[:60],
            CANARY,
            CHUNKS,
            BODY,
            b"\r\n",
            b"\n",
            b"0\r\n\r\n",
            b"Content-Length: 7\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Expect: 100-continue\r\n\r\n",
            b"HTTP/1.1",
            b"\x00",
        ]
    ),
    st.binary(max_size=40),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES, min_size=1, max_size=8))
def test_bytes_at_random_are_answered_or_dropped(gateway: GatewayThread, pieces: list[bytes]) -> None:
    """After the client has said its last, the gateway comes to an end by itself, with no more answers than
    there are request lines in what it was sent, and goes on serving others."""
    data = b"".join(pieces)
    before = len(gateway.running.router.requests)
    received = b""
    with socket.create_connection(("127.0.0.1", gateway.running.port), PATIENCE_S) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                received += chunk
        except TimeoutError:
            raise
        except OSError:  # it hung up while we were still sending
            pass
    lines = data.count(b"HTTP/1.")
    assert len(statuses(received)) <= lines + 1  # one refusal of what is no request
    reached = len(gateway.running.router.requests) - before
    assert reached <= data.count(b"POST /v1/predict")
    assert statuses(gateway.raw(message(LENGTH, b"Connection: close"))) == [b"200"]
