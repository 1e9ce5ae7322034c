"""Deadlines, bounds and draining of one connection, on a transport in memory. A tick is a second."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import threading
from functools import partial
from typing import Any

import pytest
import uvicorn
from headrace.v1.dataplane_pb2 import PredictReply
from prometheus_client import CollectorRegistry
from uvicorn.server import ServerState

from services.common.clock import SystemClock
from services.common.errors import Unavailable
from services.common.telemetry import setup_tracing
from services.gateway import targets
from services.gateway.call import Call, Speaker
from services.gateway.catalogue import Catalogue
from services.gateway.hot import heads
from services.gateway.hot.front import HotFront, HttpLimits
from services.gateway.hot.protocol import HotProtocol
from services.gateway.keys import Key, KeyRing
from services.gateway.metrics import GatewayMetrics
from services.gateway.predict import PredictLimits, PredictService
from services.gateway.reading import BodyReaders
from services.gateway.router_client import RouterClient
from services.gateway.targets import Dialect
from tests.fixtures.gateway import PREDICT_ONLY, api_key, configs
from tests.fixtures.waiting import PATIENCE_S, eventually
from tests.fixtures.wires import Cable, HeldRouter

BODY = json.dumps({"model": "cancer", "inputs": [[1, 2, 3]]}).encode()
HEAD = (
    b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nX-API-Key: "
    + PREDICT_ONLY.encode()
    + b"\r\nContent-Length: %d\r\n\r\n" % len(BODY)
)


class Connection:
    """One client's connection and everything behind it."""

    def __init__(
        self,
        *,
        inline_bytes: int = 64 << 10,
        max_held_bytes: int = 1 << 20,
        max_body_bytes: int = 10_000,
        **limits: int,
    ) -> None:
        clock = SystemClock()
        keys, catalogue = KeyRing(clock), Catalogue()
        key = api_key(PREDICT_ONLY, ["predict"])
        keys.apply(key.key_id.encode(), key.SerializeToString())
        for config in configs():
            catalogue.apply(config.model.encode(), config.SerializeToString())
        self.keys, self.catalogue = keys, catalogue
        self.channel = HeldRouter()
        service = PredictService(
            catalogue=catalogue,
            keys=keys,
            router=RouterClient([self.channel]),
            tracing=setup_tracing("gateway", None),
            metrics=GatewayMetrics(CollectorRegistry()),
            clock=clock,
            limits=PredictLimits(
                max_body_bytes=max_body_bytes,
                max_unpacked_json_bytes=5_000,
                inline_bytes=inline_bytes,
                max_held_bytes=max_held_bytes,
            ),
        )
        self.keys = keys
        self.front = HotFront(service, HttpLimits(**limits))
        self._connect()

    def sibling(self) -> Connection:
        """Another connection to the same front."""
        other = copy.copy(self)
        other._connect()
        return other

    def _connect(self) -> None:
        self.asked: list[str] = []
        config_ = uvicorn.Config(
            self._app, interface="asgi3", lifespan="off", log_config=None, access_log=False
        )
        config_.load()
        make = partial(HotProtocol, self.front)
        self.protocol = make(config=config_, server_state=ServerState(), app_state={})
        self.transport = Cable()
        self.protocol.connection_made(self.transport)

    def statuses(self) -> list[bytes]:
        """Of the answers so far."""
        return [bytes(part[:3]) for part in self.transport.written.split(b"HTTP/1.1 ")[1:]]

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        await receive()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def feed(self, data: bytes) -> None:
        self.transport.deliver(data, self.protocol)

    def ticks(self, count: int) -> None:
        for _ in range(count):
            self.protocol.tick()


@pytest.fixture
async def connection() -> Connection:
    return Connection()


async def test_silence_closes_an_idle_connection(connection: Connection) -> None:
    connection.ticks(75)
    assert not connection.transport.closed
    connection.feed(HEAD + BODY)
    connection.channel.answer()
    connection.ticks(75)
    assert not connection.transport.closed
    connection.ticks(1)
    assert connection.transport.closed
    assert connection.statuses() == [b"200"]


async def test_a_trickling_head_is_answered_408(connection: Connection) -> None:
    for index in range(10):
        connection.feed(HEAD[index : index + 1])
        connection.ticks(1)
    assert connection.statuses() == []
    connection.feed(HEAD[10:11])
    connection.ticks(1)
    assert connection.statuses() == [b"408"]
    assert connection.transport.closed


async def test_a_trickling_body_is_answered_408_and_a_wait_for_the_router_is_not(
    connection: Connection,
) -> None:
    connection.feed(HEAD)
    for index in range(30):
        connection.feed(BODY[index : index + 1])
        connection.ticks(1)
    assert connection.statuses() == []
    connection.ticks(1)
    assert connection.statuses() == [b"408"]
    other = Connection()
    other.feed(HEAD + BODY)
    other.ticks(1000)
    assert not other.transport.closed
    other.channel.answer()
    assert other.statuses() == [b"200"]


async def test_a_head_whose_end_we_do_not_read_yet_is_not_late(connection: Connection) -> None:
    connection.feed((HEAD + BODY) * 2 + HEAD[:20])
    assert connection.transport.reading_held
    connection.ticks(60)  # what is asked first takes long
    connection.channel.answer()
    assert not connection.transport.reading_held
    connection.feed(HEAD[20:] + BODY)
    connection.channel.answer()
    connection.channel.answer()
    assert connection.statuses() == [b"200"] * 3


@pytest.mark.parametrize("head", [b"GET /x HTTP/1.1\r\nX: ", b"GET /"])
async def test_endless_heads(connection: Connection, head: bytes) -> None:
    connection.feed(head)
    for _ in range(80):
        if connection.transport.closed:
            break
        connection.feed(b"a" * 1024)
    assert connection.statuses() == [b"431"]
    assert connection.transport.closed


async def test_what_strangers_send_is_not_remembered_at_length(connection: Connection) -> None:
    path, name = b"/v1/models/" + b"m" * 20_000, b"X-" + b"n" * 20_000
    connection.feed(b"POST " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert path not in targets._known
    other = Connection()
    other.feed(b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nX-Short: 1\r\n" + name + b": 1\r\n\r\n")
    assert b"X-Short" in HotProtocol._names
    assert name not in HotProtocol._names


@pytest.mark.parametrize("path", [b"/v1/predict", b"/health/live"])
async def test_too_many_headers(connection: Connection, path: bytes) -> None:
    connection.feed(b"POST " + path + b" HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 200 + b"\r\n")
    assert connection.statuses() == [b"431"]
    assert connection.asked == []


@pytest.mark.parametrize(
    "bad",
    [
        b"POST /v1/predict HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
)
@pytest.mark.parametrize("answered_before", [True, False])
async def test_a_bad_request_after_a_good_one_leaves_that_alone(
    connection: Connection,
    bad: bytes,
    answered_before: bool,
) -> None:
    if answered_before:
        connection.feed(HEAD + BODY)
        connection.channel.answer()
        connection.feed(bad)
    else:
        connection.feed(HEAD + BODY + bad)
        assert connection.statuses() == []
        connection.channel.answer()
    assert connection.statuses() in ([b"200", b"400"], [b"200", b"431"])
    assert connection.transport.closed


async def test_a_client_that_leaves_its_answers_unread_stops_its_own_pipeline(connection: Connection) -> None:
    connection.feed((HEAD + BODY) * 3)
    assert len(connection.channel.waiting) == 1
    connection.protocol.pause_writing()
    connection.channel.answer()
    assert len(connection.channel.waiting) == 0
    assert connection.transport.reading_held
    connection.protocol.resume_writing()
    assert len(connection.channel.waiting) == 1
    connection.channel.answer()
    connection.channel.answer()
    assert connection.statuses() == [b"200"] * 3
    assert not connection.transport.reading_held
    connection.protocol.pause_writing()
    connection.ticks(31)
    assert connection.transport.aborted


def read_slowly_and_then_stop(connection: Connection) -> None:
    for left in range(100, 0, -1):
        connection.transport.unread = left
        connection.ticks(1)
    assert not connection.transport.aborted
    connection.ticks(31)
    assert connection.transport.aborted


async def test_a_client_that_reads_slowly_may_take_as_long_as_it_needs(connection: Connection) -> None:
    connection.feed(HEAD + BODY)
    connection.ticks(100)  # an answer that takes long leaves its reader as much time as any other
    for left in range(100, 0, -1):
        connection.transport.unread = left
        connection.protocol.pause_writing()
        connection.ticks(30)
        connection.protocol.resume_writing()
    assert not connection.transport.aborted
    connection.protocol.pause_writing()
    read_slowly_and_then_stop(connection)  # one large answer, which the transport has as a whole


async def test_what_is_left_of_the_last_answer_may_be_read_slowly(connection: Connection) -> None:
    connection.feed(post(BODY, b"Connection: close\r\n"))
    connection.channel.answer()
    assert connection.transport.closed
    read_slowly_and_then_stop(connection)


async def test_a_lost_connection_cancels_what_runs_and_drops_what_waits(connection: Connection) -> None:
    connection.feed((HEAD + BODY) * 3)
    connection.protocol.connection_lost(None)
    assert connection.channel.cancelled == [1]
    assert connection.channel.waiting == {}
    assert connection.front.connections == set()


async def test_asgi_and_hot_keep_their_order(connection: Connection) -> None:
    live = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    connection.feed(HEAD + BODY + live + HEAD + BODY)
    await asyncio.sleep(0)
    assert connection.asked == []
    connection.channel.answer()
    for _ in range(5):
        await asyncio.sleep(0)
    assert connection.asked == ["/health/live"]
    connection.channel.answer()
    assert connection.statuses() == [b"200", b"204", b"200"]


async def test_the_rest_of_a_refused_body_is_read_for_a_while(connection: Connection) -> None:
    connection.feed(HEAD.replace(b"Content-Length: %d" % len(BODY), b"Content-Length: 99999"))
    assert connection.statuses() == [b"413"]
    assert not connection.transport.closed
    connection.feed(b"x" * 50_000)
    assert not connection.transport.closed
    connection.feed(b"x" * 49_999)
    assert connection.transport.closed
    late = Connection()
    late.feed(HEAD.replace(b"Content-Length: %d" % len(BODY), b"Content-Length: 99999"))
    late.ticks(6)
    assert late.transport.closed


STRANGER = HEAD.replace(PREDICT_ONLY.encode(), b"hr_nobody")


async def test_bodies_of_strangers_are_not_collected(connection: Connection) -> None:
    connection.feed(STRANGER + BODY[:10])
    assert connection.statuses() == [b"401"]
    assert b"connection: close\r\n" in connection.transport.written
    assert not connection.transport.closed  # the rest is read, so that the client sees why
    connection.feed(BODY[10:])
    assert connection.transport.closed
    assert connection.front.service.bodies.held == 0
    whole = Connection()
    whole.feed((STRANGER + BODY) * 2)
    assert whole.statuses() == [b"401"] * 2
    assert not whole.transport.closed


async def test_strangers_are_not_asked_to_go_on(connection: Connection) -> None:
    expecting = b"Expect: 100-continue\r\n\r\n"
    connection.feed(STRANGER[:-2] + expecting)
    assert connection.statuses() == [b"401"]
    assert connection.transport.closed
    known = Connection()
    known.feed(HEAD[:-2] + expecting)
    assert known.transport.written == b"HTTP/1.1 100 Continue\r\n\r\n"
    known.feed(BODY[:5])
    known.feed(BODY[5:])
    known.channel.answer()
    assert known.statuses() == [b"100", b"200"]


async def test_a_key_revoked_while_the_body_arrives_opens_nothing(connection: Connection) -> None:
    connection.feed(HEAD + BODY[:10])
    connection.keys.apply(PREDICT_ONLY.split("_")[1].encode(), None)
    connection.feed(BODY[10:])
    assert connection.statuses() == [b"401"]


@pytest.mark.parametrize("end", ["answer", "leave", "bad"])
async def test_unfinished_bodies_are_bounded_together(end: str) -> None:
    connection = Connection(max_held_bytes=100)
    budget = connection.front.service.bodies
    connection.feed(post(b" " * 200)[:-150])
    assert budget.held == 50
    other = connection.sibling()
    other.feed(post(b" " * 200)[:-140])
    assert other.statuses() == [b"503"]
    assert b"retry-after: 1\r\n" in other.transport.written
    assert budget.held == 50
    if end == "answer":
        connection.feed(b" " * 150)
        assert connection.statuses() == [b"400"]
    elif end == "leave":
        connection.protocol.connection_lost(None)
    else:
        connection.ticks(31)
        assert connection.statuses() == [b"408"]
    assert budget.held == 0


async def test_connections_are_bounded() -> None:
    first = Connection(max_connections=10)
    others = [first.sibling() for _ in range(10)]
    assert not any(other.transport.closed for other in others)
    others[8].feed(HEAD + BODY)
    others[9].feed(HEAD + BODY)
    assert (others[8].statuses(), others[9].statuses()) == ([], [b"503"])
    assert b"retry-after: 1\r\n" in others[9].transport.written
    assert others[9].transport.closed
    assert first.sibling().transport.aborted


async def test_a_refused_expectation_closes_at_once(connection: Connection) -> None:
    raw = HEAD.replace(b"Content-Length: %d" % len(BODY), b"Content-Length: 99999\r\nExpect: 100-continue")
    connection.feed(raw)
    assert connection.statuses() == [b"413"]
    assert connection.transport.closed


async def test_a_body_that_was_asked_for_and_is_refused_is_read_for_a_while() -> None:
    connection = Connection(max_held_bytes=100)
    connection.feed(post(b" " * 200, b"Expect: 100-continue\r\n")[:-200])
    assert connection.statuses() == [b"100"]
    connection.feed(b" " * 150)
    assert connection.statuses() == [b"100", b"503"]
    assert not connection.transport.closed  # or its sender would be reset before it has read why
    connection.feed(b" " * 50)
    assert connection.transport.closed


async def test_draining_closes_idle_connections_and_finishes_running_ones(connection: Connection) -> None:
    connection.feed(HEAD + BODY)
    connection.front.draining = True
    connection.ticks(1)
    assert not connection.transport.closed
    connection.channel.answer()
    assert b"connection: close\r\n" in connection.transport.written
    assert connection.transport.closed
    idle = Connection()
    idle.front.draining = True
    idle.ticks(2)
    assert not idle.transport.closed  # a request may be on its way
    idle.ticks(1)
    assert idle.transport.closed


async def test_shutdown_waits_for_the_pipeline(connection: Connection) -> None:
    connection.feed(HEAD + BODY)
    connection.protocol.shutdown()
    assert not connection.transport.closed
    connection.channel.answer()
    assert connection.transport.closed
    idle = Connection()
    idle.protocol.shutdown()
    assert idle.transport.closed


LARGE = json.dumps({"model": "cancer", "inputs": [[1, 2, 3]] * 20}).encode()


def post(body: bytes, headers: bytes = b"") -> bytes:
    return HEAD.replace(b"%d\r\n" % len(BODY), b"%d\r\n%s" % (len(body), headers)) + body


async def test_a_large_body_is_read_beside_the_loop_and_keeps_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = Connection(inline_bytes=200)
    speaker = connection.front.service.speakers[Dialect.NATIVE]
    quick, threads = speaker.quick, {}

    def noting(_self: Speaker, call: Call, key: Key, received_at_us: int) -> bytes | None:
        threads[len(call.body)] = threading.current_thread()
        return quick(call, key, received_at_us)

    monkeypatch.setattr(type(speaker), "quick", noting)
    connection.feed(post(LARGE) + post(BODY))
    assert connection.channel.waiting == {}
    await eventually(lambda: bool(connection.channel.waiting))
    assert [request.inputs[0].shape[0] for request, _ in connection.channel.waiting.values()] == [20]
    connection.channel.answer()
    connection.channel.answer()
    assert connection.statuses() == [b"200", b"200"]
    assert threads[len(LARGE)] is not threading.main_thread()
    assert threads[len(BODY)] is threading.main_thread()


async def test_a_wrong_large_body_is_explained() -> None:
    connection = Connection(inline_bytes=200)
    connection.feed(post(LARGE.replace(b"3]]", b"null]]")) + post(BODY))
    await eventually(lambda: bool(connection.transport.written))
    assert connection.statuses() == [b"422"]
    assert b'"inputs[19][2]"' in connection.transport.written
    connection.channel.answer()
    assert connection.statuses() == [b"422", b"200"]


async def test_a_client_that_leaves_while_its_body_is_read_reaches_no_router() -> None:
    connection = Connection(inline_bytes=200)
    readers = connection.front.service._readers
    connection.feed(post(LARGE))
    connection.protocol.connection_lost(None)
    await eventually(lambda: readers.room == 64)
    assert connection.channel.waiting == {}


async def test_json_that_unpacks_to_too_much_is_refused_unread(connection: Connection) -> None:
    packed = gzip.compress(BODY + b" " * 5_000)
    connection.feed(post(packed, b"Content-Encoding: gzip\r\n"))
    await eventually(lambda: bool(connection.transport.written))
    assert connection.statuses() == [b"413"]


async def test_bodies_that_wait_for_a_thread_are_bounded() -> None:
    readers, blocked = BodyReaders(threads=1, waiting=2), threading.Event()
    done: list[BaseException | None] = []

    def work() -> None:
        blocked.wait(PATIENCE_S)

    for _ in range(2):
        readers.read(work, done.append)
    with pytest.raises(Unavailable):
        readers.read(blocked.clear, done.append)
    blocked.set()
    await eventually(lambda: done == [None, None])
    readers.close()


async def test_shutdown_answers_a_request_that_is_arriving(connection: Connection) -> None:
    connection.feed(HEAD[:20])
    connection.protocol.shutdown()
    assert not connection.transport.closed
    connection.feed(HEAD[20:] + BODY)
    connection.channel.answer()
    assert connection.statuses() == [b"200"]
    assert b"connection: close\r\n" in connection.transport.written
    assert connection.transport.closed


async def test_a_half_closed_client_gets_its_answers(connection: Connection) -> None:
    connection.feed((HEAD + BODY) * 2)
    assert connection.protocol.eof_received()
    connection.channel.answer()
    assert not connection.transport.closed
    connection.channel.answer()
    assert connection.statuses() == [b"200"] * 2
    assert connection.transport.closed


INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_a_half_closed_client_is_asked_whether_it_is_there_for_as_long_as_it_waits(
    connection: Connection,
) -> None:
    connection.feed((HEAD + BODY) * 2)
    assert connection.protocol.eof_received()
    connection.ticks(60)
    assert connection.transport.written == INTERIM * 60
    connection.channel.answer()
    connection.ticks(1)
    connection.channel.answer()
    assert connection.statuses() == [b"100"] * 60 + [b"200", b"100", b"200"]
    assert connection.transport.closed


async def test_a_half_closed_client_that_is_found_to_have_left_is_given_up(connection: Connection) -> None:
    connection.feed(HEAD + BODY)
    assert connection.protocol.eof_received()
    connection.ticks(2)
    connection.protocol.connection_lost(BrokenPipeError())  # as of a write that its reset has answered
    assert connection.channel.cancelled
    assert not connection.channel.waiting


async def test_a_half_closed_client_of_http_1_0_is_sent_nothing_but_its_answer(
    connection: Connection,
) -> None:
    connection.feed((HEAD + BODY).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert connection.protocol.eof_received()
    connection.ticks(60)
    assert not connection.transport.written
    connection.channel.answer()
    assert connection.statuses() == [b"200"]


async def test_a_half_closed_client_that_leaves_its_answers_unread_is_let_go() -> None:
    connection = Connection(unread_s=3)
    connection.feed((HEAD + BODY) * 2)
    assert connection.protocol.eof_received()
    connection.protocol.pause_writing()
    connection.ticks(3)
    assert not connection.transport.aborted
    assert not connection.transport.written
    connection.ticks(1)
    assert connection.transport.aborted


@pytest.mark.parametrize("sent", [b"", HEAD[:20], HEAD + BODY[:5]])
async def test_a_client_that_ends_before_its_request_does_is_let_go(
    connection: Connection, sent: bytes
) -> None:
    connection.feed(sent)
    assert not connection.protocol.eof_received()


async def test_a_failed_answer_is_answered_once(connection: Connection) -> None:
    connection.feed(HEAD + BODY)

    def broken(reply: PredictReply) -> None:
        reply.outputs[0].data = b"1"

    connection.channel.answer(broken)
    assert connection.statuses() == [b"500"]


# Heads that were parsed before


def acquainted() -> Connection:
    """One to which the head of `post(BODY)` is known."""
    connection = Connection()
    for _ in range(2):
        connection.feed(post(BODY))
        connection.channel.answer()
    assert connection.front.heads.find(post(BODY)) is not None
    connection.transport.take()
    return connection


async def test_a_known_head_needs_no_parser_and_gets_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection()
    for _ in range(2):
        connection.feed(post(BODY))
        connection.channel.answer()
    monkeypatch.setattr(connection.protocol, "parser", None)
    connection.feed(post(BODY))
    connection.channel.answer()
    _, first, second = connection.transport.written.split(b"HTTP/1.1 ")[1:]
    assert first[: first.index(b"x-request-id")] == second[: second.index(b"x-request-id")]
    assert connection.statuses() == [b"200"] * 3


@pytest.mark.parametrize("cut", [10, len(HEAD) - 1, len(HEAD), len(HEAD) + 5])
async def test_a_known_head_that_arrives_in_pieces_is_parsed(cut: int) -> None:
    connection = acquainted()
    for _ in range(3):
        connection.feed(post(BODY))
        connection.channel.answer()
        connection.feed(post(BODY)[:cut])
        connection.feed(post(BODY)[cut:])
        connection.channel.answer()
    assert connection.statuses() == [b"200"] * 6


async def test_a_known_head_before_another_request_is_parsed() -> None:
    connection = acquainted()
    for _ in range(2):
        connection.feed(post(BODY))
        connection.channel.answer()
        connection.feed(post(BODY) + post(BODY) + post(BODY)[:20])
        connection.channel.answer()
        connection.channel.answer()
        connection.feed(post(BODY)[20:])
        connection.channel.answer()
    assert connection.statuses() == [b"200"] * 8


async def test_a_known_head_while_another_is_unanswered_waits_its_turn() -> None:
    connection = acquainted()
    connection.feed(post(BODY))
    connection.feed(post(BODY))
    assert len(connection.channel.waiting) == 1
    connection.channel.answer()
    connection.channel.answer()
    assert connection.statuses() == [b"200"] * 2


@pytest.mark.parametrize(
    "headers",
    [b"X-Request-Id: a\r\n", b"traceparent: 00-1\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n"],
)
async def test_heads_that_are_new_each_time_or_end_a_connection_are_not_remembered(headers: bytes) -> None:
    connection = Connection()
    for _ in range(3):
        if not connection.transport.is_closing():
            connection.feed(post(BODY, headers))
            connection.channel.answer()
    assert connection.front.heads.find(post(BODY, headers)) is None


async def test_heads_that_came_once_drive_out_no_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_REMEMBERED", 4)
    connection = acquainted()
    for number in range(20):
        connection.feed(post(BODY, b"X-Trace: %d\r\n" % number))
        connection.channel.answer()
    assert connection.front.heads.find(post(BODY)) is not None
    assert connection.front.heads.find(post(BODY, b"X-Trace: 19\r\n")) is None


async def test_one_malformed_body_leaves_its_head_the_quick_way() -> None:
    connection = acquainted()
    connection.feed(post(BODY[:-1] + b"!"))
    assert connection.statuses() == [b"400"]
    head, _ = connection.front.heads.find(post(BODY)) or (None, 0)
    assert head is not None
    assert head.odd == 1
    connection.feed(post(BODY))
    connection.channel.answer()
    assert head.odd == 0


async def test_refused_heads_are_not_remembered() -> None:
    connection = Connection()
    bad = post(BODY).replace(PREDICT_ONLY.encode(), b"hr_nobody")
    for _ in range(3):
        connection.feed(bad)
    assert connection.statuses() == [b"401"] * 3
    assert connection.front.heads.find(bad) is None


async def test_a_revoked_key_closes_a_known_head() -> None:
    connection = acquainted()
    revoked = api_key(PREDICT_ONLY, ["predict"], revision=2, revoked=True)
    connection.keys.apply(revoked.key_id.encode(), revoked.SerializeToString())
    connection.feed(post(BODY))
    assert connection.statuses() == [b"401"]


async def test_a_model_that_left_is_not_found_by_its_plan() -> None:
    connection = acquainted()
    connection.catalogue.apply(b"cancer", None)
    connection.feed(post(BODY))
    assert connection.statuses() == [b"404"]
