"""What one key may hold of the bytes of all bodies, whatever way they come: it leaves room for others."""

from __future__ import annotations

import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from headrace.v1.tensor_pb2 import Code
from starlette.requests import Request
from starlette.types import Message

from services.gateway.keys import Key, Scope
from services.gateway.rest.door import authenticated, bounded_body
from services.gateway.rest.hot_routes import hot_routes
from services.gateway.rpc.limits import RpcLimits
from services.gateway.rpc.methods import Methods
from tests.fixtures.gateway import PREDICT_ONLY, api_key
from tests.fixtures.rpc import CHECK, STREAM_INFER, Client, Front, prefixed
from tests.fixtures.wires import padded
from tests.unit.gateway.test_gateway_connection import Connection, post

GUEST = "hr_guestguestgu_" + "G" * 43
#: Of 1000 bytes one key has three times 190 and leaves 430; four times, and it would leave less than a third.
HELD, BODY, PIECE, MOST = 1000, 200, 190, 3


def with_guest(behind: Connection | Front) -> None:
    """Let a second key in."""
    key = api_key(GUEST, ["predict"])
    behind.keys.apply(key.key_id.encode(), key.SerializeToString())


def key_of(behind: Connection | Front, text: str) -> Key:
    key = behind.keys.by_id(text.split("_")[1])
    assert key is not None
    return key


async def test_bodies_over_http() -> None:
    first = Connection(max_held_bytes=HELD, max_body_bytes=BODY)
    with_guest(first)
    greedy, guest = [first.sibling() for _ in range(MOST + 2)], first.sibling()
    raw = post(b" " * BODY)[: PIECE - BODY]
    for connection in greedy:
        connection.feed(raw)
    assert [connection.statuses() for connection in greedy] == [[]] * MOST + [[b"429"]] * 2
    guest.feed(raw.replace(PREDICT_ONLY.encode(), GUEST.encode()))
    assert guest.statuses() == []
    assert key_of(first, GUEST).holder.held == PIECE
    for connection in (*greedy, guest):
        connection.protocol.connection_lost(None)
    assert first.front.service.bodies.held == key_of(first, PREDICT_ONLY).holder.held == 0
    assert key_of(first, GUEST).holder.held == 0


@pytest.mark.parametrize("limits", [None, RpcLimits(max_stream_requests=1)], ids=["unary", "stream"])
async def test_messages_over_grpc(limits: RpcLimits | None) -> None:
    front = Front(limits, max_held_bytes=HELD, max_body_bytes=BODY)
    with_guest(front)
    path = (STREAM_INFER,) if limits else ()
    greedy, guest = front.client(), front.client()

    async def begin(client: Client, key: str) -> int:
        stream = client.head(*path, x_api_key=key)
        client.send(stream, prefixed(bytes(BODY))[: 5 + PIECE], end=False)
        await client.turn()
        return stream

    streams = [await begin(greedy, PREDICT_ONLY) for _ in range(MOST + 2)]
    ended = [greedy.answers[stream].ended for stream in streams]
    assert ended == [False] * MOST + [True] * 2
    assert greedy.answers[streams[-1]].status == Code.CODE_RESOURCE_EXHAUSTED
    waits = guest.answers[await begin(guest, GUEST)]
    assert not waits.ended
    for client in (greedy, guest):
        client.connection.connection_lost(None)
    assert front.service.bodies.held == key_of(front, PREDICT_ONLY).holder.held == 0
    assert key_of(front, GUEST).holder.held == 0


async def test_answers_that_nobody_reads() -> None:
    front = Front(max_held_bytes=100_000, max_body_bytes=20_000)
    with_guest(front)
    greedy, guest = front.client(window=0), front.client(window=0)
    streams = [greedy.ask() for _ in range(5)]
    await greedy.turn()
    waiting = guest.ask(x_api_key=GUEST)
    await guest.turn()
    for _ in (*streams, waiting):
        front.router.answer(padded(19_000))
    await greedy.turn()
    await guest.turn()
    assert [greedy.answers[stream].ended for stream in streams] == [False] * 3 + [True] * 2
    assert not guest.answers[waiting].ended
    for client in (greedy, guest):
        client.connection.connection_lost(None)
    assert front.service.bodies.held == key_of(front, GUEST).holder.held == 0


@pytest.mark.parametrize("known", [False, True])
async def test_answers_of_other_methods_are_the_keys_or_else_all_strangers(known: bool) -> None:
    methods, owners = Methods(), list[Key]()
    if known:
        methods.guard("grpc.health.v1.Health", lambda _metadata: owners[0], but=frozenset())
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, methods)
    front = Front(methods=methods.by_path)
    owner = key_of(front, PREDICT_ONLY)
    owners.append(owner)
    client = front.client(window=0)
    for _ in range(3):
        client.send(client.head(CHECK), prefixed(b""))
    await client.turn(10)
    counted, others = owner.holder, front.service.bodies.strangers
    if not known:
        counted, others = others, counted
    assert (counted.held, others.held) == (6, 0)
    client.connection.connection_lost(None)
    assert counted.held == 0


@pytest.mark.parametrize("path", ["/v1/outcomes", "/v1/predict"])
async def test_bodies_of_ordinary_routes(path: str) -> None:
    behind = Front(max_held_bytes=HELD, max_body_bytes=BODY)
    key, seen = key_of(behind, PREDICT_ONLY), list[int]()

    async def receive() -> Message:
        seen.append(key.holder.held)
        return {"type": "http.request", "body": b" " * 50, "more_body": len(seen) < 3}

    headers = [(b"x-api-key", PREDICT_ONLY.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    request = Request(scope, receive)
    if path == "/v1/predict":
        route = next(one for one in hot_routes(behind.service).routes if getattr(one, "path", "") == path)
        await route.endpoint(request)  # type: ignore[attr-defined]  # it is one of FastAPI
    else:
        authenticated(request, behind.keys, Scope.PREDICT, 0.0)
        await bounded_body(request, BODY, behind.service.bodies)
    assert seen == [0, 50, 100]
    assert key.holder.held == behind.service.bodies.held == 0


async def test_a_key_that_changes_keeps_what_it_holds() -> None:
    connection = Connection(max_held_bytes=HELD, max_body_bytes=BODY)
    connection.feed(post(b" " * BODY)[: PIECE - BODY])
    changed = api_key(PREDICT_ONLY, ["predict"], revision=2)
    connection.keys.apply(changed.key_id.encode(), changed.SerializeToString())
    assert key_of(connection, PREDICT_ONLY).holder.held == PIECE
    connection.protocol.connection_lost(None)
    assert key_of(connection, PREDICT_ONLY).holder.held == 0
