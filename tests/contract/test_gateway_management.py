"""The door to the other services: what passes, in which direction, and that nothing is held in memory."""

from __future__ import annotations

import asyncio
import hashlib
import json
import select
import socket
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from services.common.lifecycle import serve_asgi
from services.gateway.rest.management import management_client, upstreams
from tests.fixtures.gateway import ADMIN, ADMIN_DIGITS, READ_DIGITS, READ_ONLY, TOKEN, GatewayThread
from tests.fixtures.waiting import PATIENCE_S, until


def document_of(name: str) -> dict[str, Any]:
    """What a service says of itself: one path, which takes a Thing, and one that nobody outside sees."""
    asked = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}}}
    return {
        "paths": {
            f"/v1/{name}/things": {"post": {"operationId": "make", "requestBody": asked}},
            "/health/ready": {"get": {"operationId": "of_the_service"}},
        },
        "components": {"schemas": {"Thing": {"type": "object", "title": name}}},
    }


class Upstream:
    """A service that tells what it was asked."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.first_piece = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        digest, size, more = hashlib.sha256(), 0, True
        while more:
            message = await receive()
            self.first_piece.set()
            digest.update(message.get("body", b""))
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        told = {
            "service": self._name,
            "method": scope["method"],
            "path": scope["raw_path"].decode().partition("?")[0],
            "query": scope["query_string"].decode(),
            "headers": {name.decode(): value.decode() for name, value in scope["headers"]},
            "size": size,
            "sha256": digest.hexdigest(),
        }
        body = json.dumps(told).encode()
        if scope["path"] == "/openapi.json":
            body = json.dumps(document_of(self._name)).encode()
        if scope["path"].endswith("/large"):
            body = b"y" * (8 << 20)
        status = 418 if scope["path"].endswith("/teapot") else 200
        headers = [(b"content-type", b"application/json"), (b"x-answer", b"1"), (b"connection", b"x-hop")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayThread]:
    with ExitStack() as stack:
        host = stack.enter_context(GatewayThread(tmp_path_factory.mktemp("upstream"), hot=True))
        settings = {}
        for name in ("registry", "analytics", "drift"):
            entered = serve_asgi(Upstream(name), "127.0.0.1", 0, drain_s=0.5)
            port = host.run(entered.__aenter__())
            stack.push(lambda *_, one=entered: host.run(one.__aexit__(None, None, None)))
            settings[f"{name}_url"] = f"http://127.0.0.1:{port}"
        yield stack.enter_context(GatewayThread(tmp_path_factory.mktemp("gateway"), hot=True, **settings))


def test_what_passes_on(gateway: GatewayThread) -> None:
    answer = gateway.request(
        "POST",
        "/v1/models/m/versions?alias=a%20b&x=1",
        b"content",
        x_request_id="ab" * 16,
        x_headrace_scopes="forged",
        content_type="application/x-thing",
        cookie="secret",
    )
    told = answer.json()
    headers = told["headers"]
    assert (told["method"], told["path"], told["query"]) == (
        "POST",
        "/v1/models/m/versions",
        "alias=a%20b&x=1",
    )
    assert headers["authorization"] == f"Bearer {TOKEN}"
    assert ADMIN not in json.dumps(told)
    assert headers["x-headrace-key-id"] == "adminadminad"
    assert headers["x-headrace-scopes"] == "admin,predict,read"
    assert headers["x-request-id"] == answer.headers["x-request-id"] != "ab" * 16
    assert answer.headers["x-correlation-id"] == "ab" * 16
    assert headers["content-type"] == "application/x-thing"
    assert "cookie" not in headers
    assert (told["size"], answer.headers["x-answer"]) == (7, "1")
    assert "connection" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200),
        ("DELETE", "/v1/deployments/m", 200),
        ("GET", "/v1/analytics/models/m/compare?a=1&b=2", 200),
        ("PUT", "/v1/drift/m/teapot", 418),
        ("POST", "/v1/experiments/exp_1/stop", 200),
        ("GET", "/v1/rollouts?model=m", 200),
        ("PUT", "/v1/models/m/holdout", 200),
        ("GET", "/v1/models/../keys", 200),  # clients fold it themselves
        ("GET", "/v1/analytics/%2e%2e/keys", 404),
        ("GET", "/v1/analytics/..%2fkeys", 404),
        ("GET", "/v1/other", 404),
    ],
)
def test_routes(gateway: GatewayThread, method: str, path: str, status: int) -> None:
    answer = gateway.request(method, path)
    assert answer.status_code == status, answer.text


def test_analytics_may_be_asked_by_readers_with_a_body(gateway: GatewayThread) -> None:
    read = f"Bearer {READ_ONLY}"
    assert gateway.request("POST", "/v1/analytics/query", b"{}", authorization=read).status_code == 200
    assert gateway.request("POST", "/v1/drift/x", b"{}", authorization=read).status_code == 403
    assert gateway.request("POST", "/v1/experiments/plan", b"{}", authorization=read).status_code == 200
    assert gateway.request("POST", "/v1/experiments", b"{}", authorization=read).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "service"),
    [
        ("POST", "/v1/experiments", "registry"),
        ("GET", "/v1/experiments/exp_1", "registry"),
        ("GET", "/v1/experiments/exp_1/assignment?unit=u", "registry"),
        ("GET", "/v1/experiments/exp_1/results", "analytics"),
        ("POST", "/v1/experiments/plan", "analytics"),
        ("POST", "/v1/experiments/off-policy", "analytics"),
        ("GET", "/v1/experiments/placebo?model=m", "analytics"),
        ("POST", "/v1/rollouts/rol_1/pause", "registry"),
        ("GET", "/v1/rollouts/rol_1/results", "analytics"),
        ("PUT", "/v1/models/m/holdout", "registry"),
        ("GET", "/v1/shadows/m", "analytics"),
        ("GET", "/v1/drift/alerts", "drift"),
    ],
)
def test_who_answers(gateway: GatewayThread, method: str, path: str, service: str) -> None:
    told = gateway.request(method, path).json()
    assert (told["service"], told["method"], told["path"]) == (service, method, path.partition("?")[0])


def test_a_key_for_some_models_changes_nothing_by_naming_one_in_the_query(gateway: GatewayThread) -> None:
    """What the body is about is the service's to read, and it does not know of the key's models."""
    for path in ("/v1/experiments?model=digits", "/v1/rollouts?model=digits"):
        answer = gateway.request("POST", path, b"{}", authorization=f"Bearer {ADMIN_DIGITS}")
        assert (answer.status_code, answer.json()["field"]) == (403, "model")
    answer = gateway.request(
        "PUT", "/v1/models/digits/holdout", b"{}", authorization=f"Bearer {ADMIN_DIGITS}"
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/dlq"),
        ("GET", "/v1/dlq/inference.predictions.v1.drift.dlq"),
        ("POST", "/v1/dlq/inference.predictions.v1.drift.dlq/replay"),
        ("POST", "/v2/repository/models/cancer/load"),
        ("POST", "/v2/repository/models/none/unload"),
    ],
)
def test_an_admin_for_some_models_is_none_for_the_others(
    gateway: GatewayThread, method: str, path: str
) -> None:
    answer = gateway.request(method, path, authorization=f"Bearer {ADMIN_DIGITS}")
    assert answer.status_code == 403
    assert "This key is " in answer.text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models/digits/versions/1", 200),
        ("/v1/deployments/digits", 200),
        ("/v1/analytics/models/digits/compare?a=1&b=2", 200),
        ("/v1/drift/models/digits/versions/1/windows", 200),
        ("/v1/drift/alerts?model=digits", 200),
        ("/v1/analytics/query?model=digits", 200),
        ("/v1/analytics/predictions/0?model=digits", 200),
        ("/v1/models/cancer", 403),
        ("/v1/deployments/cancer", 403),
        ("/v1/analytics/models/cancer", 403),
        ("/v1/analytics/models/cancer?model=digits", 403),
        ("/v1/analytics//models/digits", 403),
        ("/v1/drift/models/cancer", 403),
        ("/v1/drift/models/cancer?model=digits", 403),
        ("/v1/drift/alerts", 403),
        ("/v1/drift/alerts?model=digits&model=cancer", 403),
        ("/v1/analytics/predictions/0", 403),
        ("/v1/analytics/predictions/0?model=cancer", 403),
        ("/v1/drift/webhooks?model=digits", 403),
        ("/v1/experiments?model=digits", 200),
        ("/v1/experiments/placebo?model=digits", 200),
        ("/v1/rollouts?model=digits", 200),
        ("/v1/rollouts?model=digits&model=cancer", 403),
        ("/v1/experiments", 403),
        ("/v1/experiments/exp_1?model=digits", 403),
        ("/v1/experiments/exp_1/results?model=digits", 403),
        ("/v1/keys", 403),
        ("/v1/models", 403),
    ],
)
def test_a_key_for_some_models_reads_nothing_about_others(
    gateway: GatewayThread, path: str, status: int
) -> None:
    answer = gateway.request("GET", path, authorization=f"Bearer {READ_DIGITS}")
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize("host", ["x/v1/models/digits?", "x/v1/models/digits#", "x/v1/models/digits/"])
def test_a_key_for_some_models_gains_nothing_by_what_it_calls_the_host(
    gateway: GatewayThread, host: str
) -> None:
    for path in ("/v1/keys", "/v1/models/churn", "/v1/models/digits%3F/../churn", "/v1/models/digits/%2e%2e"):
        answer = gateway.request("GET", path, authorization=f"Bearer {READ_DIGITS}", host=host)
        assert answer.status_code in (400, 403, 404), (path, answer.text)


def test_large_bodies_pass_in_pieces(gateway: GatewayThread) -> None:
    piece, count = b"x" * (1 << 20), 96

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield piece

    async def upload() -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            return await client.post(
                f"{gateway.running.base}/v1/models/m/versions",
                content=pieces(),
                headers={"authorization": f"Bearer {ADMIN}"},
            )

    tracemalloc.start()
    try:
        told = asyncio.run(upload()).json()
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert told["size"] == count << 20
    assert told["sha256"] == hashlib.sha256(piece * count).hexdigest()
    # Gateway, upstream and client together: far from one whole body.
    assert peak < count << 19
    assert len(gateway.request("GET", "/v1/models/large").content) == 8 << 20


async def test_slow_queries_keep_no_other_service_waiting() -> None:
    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def prompt(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
        writer.close()

    slow, registry = [await asyncio.start_server(one, "127.0.0.1", 0) for one in (silent, prompt)]
    bases = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in (registry, slow)]
    services = upstreams(bases[0], bases[1], bases[1])
    async with management_client(TOKEN, services, connect_s=5.0) as client:
        queries = [asyncio.create_task(client.get(bases[1] + "/v1/analytics")) for _ in range(100)]
        await asyncio.sleep(0.05)
        revoked = await client.delete(bases[0] + "/v1/keys/k", timeout=30.0)
        assert revoked.status_code == 204
        assert not any(query.done() for query in queries)
        for query in queries:
            query.cancel()
        await asyncio.wait(queries)
    for server in (slow, registry):
        server.close()


def test_a_key_whose_bodies_never_end_leaves_room_for_others(gateway: GatewayThread) -> None:
    head = (
        f"GET /v1/models/digits HTTP/1.1\r\nHost: h\r\nX-API-Key: {READ_DIGITS}\r\nContent-Length: 9\r\n\r\n."
    )
    with ExitStack() as stack:
        slow = []
        for _ in range(70):
            slow.append(stack.enter_context(socket.create_connection(("127.0.0.1", gateway.running.port))))
            slow[-1].sendall(head.encode())
        answered, _, _ = select.select(slow, [], [], PATIENCE_S)
        assert answered[0].recv(4096).startswith(b"HTTP/1.1 429 ")
        assert gateway.request("DELETE", "/v1/keys/k").status_code == 200
    key = f"Bearer {READ_DIGITS}"
    until(lambda: gateway.request("GET", "/v1/models/digits", authorization=key).status_code == 200)


def test_answers_that_nobody_reads_to_their_end_take_no_room(gateway: GatewayThread) -> None:
    ask = f"GET /v1/models/digits/large HTTP/1.1\r\nHost: h\r\nX-API-Key: {READ_DIGITS}\r\n\r\n"
    for _ in range(40):
        with socket.create_connection(("127.0.0.1", gateway.running.port)) as connection:
            connection.sendall(ask.encode())
            assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_curl_says_nothing_of_a_body_that_is_json(gateway: GatewayThread) -> None:
    answer = gateway.request(
        "PUT", "/v1/deployments/m", b"{}", content_type="application/x-www-form-urlencoded"
    )
    assert answer.json()["headers"]["content-type"] == "application/json"


def test_one_document_tells_of_all_services(gateway: GatewayThread) -> None:
    document = gateway.request("GET", "/openapi.json").json()
    assert "/v1/predict" in document["paths"]
    for name in ("registry", "analytics", "drift"):
        made = document["paths"][f"/v1/{name}/things"]["post"]
        (taken,) = made["requestBody"]["content"].values()
        thing = taken["schema"]["$ref"].removeprefix("#/components/schemas/")
        assert document["components"]["schemas"][thing] == {"type": "object", "title": name}
        assert (made["operationId"], made["tags"]) == (f"{name}_make", [name])
    assert document["paths"]["/health/ready"]["get"]["operationId"] != "of_the_service"


def test_the_root_leads_to_the_documentation(gateway: GatewayThread) -> None:
    root = gateway.request("GET", "/")
    assert (root.status_code, root.headers["location"]) == (307, "/docs")
    assert "/openapi.json" in gateway.request("GET", "/docs").text
