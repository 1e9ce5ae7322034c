"""The gateway over HTTP. Every test runs on both ways to the hot routes: before ASGI, and through it. Both
must give the same answers, headers and errors."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, Priority
from headrace.v1.events_pb2 import Outcome, OutcomeBatch
from headrace.v1.tensor_pb2 import Code

from services.common.targeting import attribute
from services.common.topics import OUTCOMES
from services.gateway.codecs.native import PredictBody
from services.gateway.rest.outcomes import parse_outcomes
from tests.fixtures.gateway import (
    ADMIN,
    OTHER_MODEL,
    PREDICT_ONLY,
    READ_ONLY,
    SLOW,
    GatewayThread,
    answer_like_a_worker,
    failing,
)
from tests.fixtures.waiting import PATIENCE_S, until

ROW = [10.0, 2.0, 3.0]
_LIMIT = 1 << 20


@pytest.fixture(scope="module", params=["hot", "asgi"])
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayThread]:
    state = tmp_path_factory.mktemp(f"gateway-{request.param}")
    with GatewayThread(state, hot=request.param == "hot", max_body_bytes=_LIMIT) as running:
        yield running


@pytest.fixture(autouse=True)
def _usual_router(gateway: GatewayThread) -> Iterator[None]:
    yield
    gateway.running.router.answer = answer_like_a_worker
    gateway.running.bus.away = False


def predict(gateway: GatewayThread, body: Any, path: str = "/v1/predict", **headers: str) -> httpx.Response:
    return gateway.request("POST", path, body, **headers)


def message(body: bytes, *extra: bytes, path: bytes = b"/v1/predict", key: str = ADMIN) -> bytes:
    """A request as bytes."""
    head = [
        b"POST " + path + b" HTTP/1.1",
        b"Host: gateway",
        b"Authorization: Bearer " + key.encode(),
        *extra,
    ]
    if not any(b"transfer-encoding" in line.lower() or b"content-length" in line.lower() for line in extra):
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(head) + b"\r\n\r\n" + body


GOOD = json.dumps({"model": "cancer", "inputs": [ROW]}).encode()


# Answers


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        pytest.param(
            "/v1/predict",
            {"model": "cancer", "inputs": [ROW, [20, 1, 1]], "user_id": "u1"},
            {"prediction": ["benign", "malignant"], "confidence": [0.875, 0.75], "version": "1"},
            id="rows",
        ),
        pytest.param(
            "/api/v1/predict",
            {"model": "cancer", "input": ROW},
            {"prediction": "benign", "confidence": 0.875},
            id="single-input",
        ),
        pytest.param(
            "/v1/models/cancer/predict",
            {"inputs": {"mean radius": [20, 10], "mean texture": [1, 2], "area": [1, 2]}},
            {"prediction": ["malignant", "benign"], "model": "cancer"},
            id="columns",
        ),
        pytest.param(
            "/api/v1/models/cancer/predict",
            {"inputs": [{"mean radius": 20, "mean texture": 1, "area": 1}]},
            {"prediction": ["malignant"]},
            id="row-objects",
        ),
        pytest.param(
            "/v1/predict",
            {"model": "cancer", "inputs": {"x": [ROW]}, "version": "challenger", "outputs": ["label"]},
            {"prediction": ["benign"], "outputs": {"label": [1]}, "version": "2"},
            id="tensors-and-alias",
        ),
        pytest.param(
            "/v1/predict",
            {"model": "mixed", "inputs": {"age": [1, 4], "city": ["Ulm", "Bonn"]}},
            {"prediction": [0.5, 2.0], "outputs": {"score": [0.5, 2.0]}, "version": "7"},
            id="mixed-columns",
        ),
        pytest.param(
            "/v1/embed",
            {"model": "embedder", "inputs": ["a", "b"]},
            {"embeddings": [[0.0, 1.0, 2.0, None], [1.0, 1.0, 2.0, None]], "dimensions": 4},
            id="embed-with-nan-as-null",
        ),
        pytest.param(
            "/v2/models/cancer/infer",
            {"id": "7", "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": ROW}]},
            {
                "id": "7",
                "model_name": "cancer",
                "outputs": [
                    {"name": "label", "datatype": "INT64", "shape": [1], "data": [1]},
                    {"name": "probabilities", "datatype": "FP32", "shape": [1, 2], "data": [0.125, 0.875]},
                ],
            },
            id="v2",
        ),
        pytest.param(
            "/v2/models/cancer/versions/2/infer",
            {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [ROW]}]},
            {"model_version": "2"},
            id="v2-version-nested",
        ),
    ],
)
def test_answers(gateway: GatewayThread, path: str, body: dict[str, Any], expected: dict[str, Any]) -> None:
    answer = predict(gateway, body, path)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert {name: said.get(name) for name in expected} == expected
    assert [name for name, _ in answer.headers.multi_items()] == [
        "date",
        "content-type",
        "x-request-id",
        "content-length",
    ]


def test_experiments_learn_who_asks_and_callers_which_one_assigned(gateway: GatewayThread) -> None:
    def answer(request: PredictRequest) -> PredictReply:
        reply = answer_like_a_worker(request)
        reply.variant, reply.experiment = "new", "exp_1"
        return reply

    gateway.running.router.answer = answer
    asked: dict[str, Any] = {"model": "cancer", "inputs": [ROW], "user_id": "u", "session_id": 7}
    asked["attributes"] = {"country": "DE", "age": 41, "score": 0.5, "member": True}
    for path in ("/v1/predict", "/v1/models/cancer/predict"):
        said = predict(gateway, asked, path).json()
        assert (said["variant"], said["experiment"], said["prediction"]) == ("new", "exp_1", ["benign"])
        seen = gateway.running.router.requests[-1]
        assert (seen.unit, seen.session) == ("u", "7")
        assert {name: attribute(seen, name) for name in seen.attributes} == asked["attributes"]
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": ROW}
    parameters = {"user_id": "u", "session_id": "s", "country": "DE"}
    said = predict(gateway, {"inputs": [tensor], "parameters": parameters}, "/v2/models/cancer/infer").json()
    assert (said["parameters"]["variant"], said["parameters"]["experiment"]) == ("new", "exp_1")
    seen = gateway.running.router.requests[-1]
    assert (seen.unit, seen.session, attribute(seen, "country")) == ("u", "s", "DE")
    wrong = predict(gateway, asked | {"attributes": {"country": None}})
    assert (wrong.status_code, wrong.json()["field"]) == (422, "attributes.country")


def test_the_v2_timeout_is_honoured(gateway: GatewayThread) -> None:
    path, tensor = "/v2/models/cancer/infer", {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": ROW}

    def asked(timeout: Any, **headers: str) -> tuple[int, str]:
        body = {"inputs": [tensor], "parameters": {"timeout": timeout}}
        answer = predict(gateway, body, path, **headers)
        return answer.status_code, answer.text

    assert asked(2_500_000)[0] == 200
    assert 2_000_000 < gateway.running.router.requests[-1].timeout_us <= 2_510_000
    assert asked(2_500_000, x_request_timeout_ms="1500")[0] == 200
    assert 1_000_000 < gateway.running.router.requests[-1].timeout_us <= 1_510_000
    assert asked(0)[0] == 200
    assert gateway.running.router.requests[-1].timeout_us > 5_000_000
    for wrong in (-1, 1.5, "soon", True):
        status, text = asked(wrong)
        assert status == 400, wrong
        assert "parameters.timeout" in text


def test_requests_that_share_an_id_are_not_one(gateway: GatewayThread) -> None:
    """Meshes give every request of one call tree the same id; each is counted and assigned by itself."""
    shared, path = "0123456789abcdef0123456789abcdef", "/v1/predict"
    answers = [
        predict(gateway, {"model": "cancer", "inputs": [ROW]}, path, x_request_id=shared) for _ in range(2)
    ]
    sent = [one.request_id.hex() for one in gateway.running.router.requests[-2:]]
    assert sent == [one.json()["request_id"] for one in answers]
    assert len({shared, *sent}) == 3
    refused = predict(gateway, {}, path, x_request_id="x" * 200)
    assert refused.status_code == 422
    assert "x-correlation-id" not in refused.headers
    other = gateway.request("GET", "/v2", x_request_id=shared)
    assert other.headers["x-correlation-id"] == shared != other.headers["x-request-id"]


def test_request_reaches_the_router_whole(gateway: GatewayThread) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    asked = "0123456789abcdef0123456789abcdef"
    answer = predict(
        gateway,
        {"model": "cancer", "inputs": [ROW], "user_id": 17},
        x_request_id=asked,
        traceparent=trace,
        x_request_timeout_ms="2500",
    )
    assert answer.headers["x-correlation-id"] == asked
    ours = answer.headers["x-request-id"]
    assert ours == answer.json()["request_id"] != asked
    sent = gateway.running.router.requests[-1]
    assert sent.request_id.hex() == ours
    assert sent.trace.hex() == "0af7651916cd43dd8448eb211c80319cb7ad6b716920333101"
    assert sent.unit == "17"
    assert sent.key_id == "adminadminad"
    assert 2_000_000 < sent.timeout_us <= 2_510_000
    assert list(sent.inputs[0].shape) == [1, 3]
    assert abs(sent.received_at_us / 1e6 - time.time()) < 5


@pytest.mark.parametrize(
    "traceparent", [f"00-{'a' * 32}-{'b' * 16}-00", f"00-{'0' * 32}-{'b' * 16}-01", "none"]
)
def test_traces_that_nobody_keeps_are_not_passed_on(gateway: GatewayThread, traceparent: str) -> None:
    answer = predict(gateway, {"model": "cancer", "inputs": [ROW]}, traceparent=traceparent)
    assert answer.status_code == 200, answer.text
    assert gateway.running.router.requests[-1].trace == b""


def test_gzip_and_x_api_key(gateway: GatewayThread) -> None:
    head = [b"Content-Encoding: gzip", b"X-API-Key: " + PREDICT_ONLY.encode()]
    packed = gzip.compress(GOOD)
    raw = message(packed, *head).replace(b"Authorization: Bearer " + ADMIN.encode() + b"\r\n", b"")
    assert gateway.raw(raw, stays=1).startswith(b"HTTP/1.1 200 OK")


# Errors


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b'{"model": "cancer", "inputs": [[1, 2, NaN]]}', 400, None),
        (b'{"model": "cancer", "inputs": [[1, 2, Infinity]]}', 400, None),
        (b'{"model": "cancer", ', 400, None),
        (b"", 400, None),
        (b"\xff\xfe", 400, None),
        (b'{"model":"cancer","inputs":' + b"[" * 100_000, 400, None),
        (b"[1]", 422, None),
        (b'{"model": "cancer", "inputs": [[1, 2, null]]}', 422, "inputs[0][2]"),
        (b'{"model": "cancer", "inputs": [[1,2,3],[1,2,3],[1,2,3],[1,"a",3]]}', 422, "inputs[3][1]"),
        (b'{"model": "cancer", "inputs": [[1, 2, true]]}', 422, "inputs[0][2]"),
        (b'{"model": "cancer", "inputs": [[1, 2, 1e39]]}', 422, "inputs[0][2]"),
        (b'{"model": "cancer", "inputs": [[1, 2, 1e400]]}', 422, "inputs"),
        (b'{"model": "cancer", "inputs": [[1, 2, 3], [1, 2]]}', 422, "inputs[1]"),
        (b'{"model": "cancer", "inputs": [[[1, 2, 3]]]}', 422, "inputs[0]"),
        (b'{"model": "cancer", "inputs": [1, 2, 3]}', 422, "inputs[0]"),
        (b'{"model": "cancer", "inputs": []}', 422, "inputs"),
        (b'{"model": "cancer", "inputs": {}}', 422, "inputs"),
        (b'{"model": "cancer", "inputs": "abc"}', 422, "inputs"),
        (b'{"model": "cancer", "inputs": {"y": [[1]]}}', 422, "inputs.y"),
        (b'{"model": "cancer", "inputs": {"mean radius": ["a"], "mean texture": [1], "area": [1]}}', 422,
         "inputs.mean radius[0]"),
        (b'{"model": "cancer", "inputs": {"mean radius": [1], "area": [1]}}', 422, "inputs.mean texture"),
        (b'{"model": "cancer", "inputs": [{"mean radius": 1, "area": 2}]}', 422, "inputs[0].mean texture"),
        (b'{"model": "cancer", "input": [1, "a", 3]}', 422, "input[1]"),
        (b'{"model": "mixed", "inputs": {"age": [1.5], "city": ["a"]}}', 422, "inputs.age[0]"),
        (b'{"model": "mixed", "inputs": {"age": [9223372036854775808], "city": ["a"]}}', 422,
         "inputs.age[0]"),
        (b'{"model": "mixed", "inputs": {"age": [1, 2], "city": ["a"]}}', 422, "inputs.city"),
        (b'{"model": "mixed", "inputs": {"age": [1]}}', 422, "inputs.city"),
        (b'{"model": "cancer"}', 422, "inputs"),
        (b'{"inputs": [[1, 2, 3]]}', 422, "model"),
        (b'{"model": 5, "inputs": [[1, 2, 3]]}', 422, "model"),
        (b'{"model": "cancer", "inputs": [[1, 2, 3]], "usr_id": "a"}', 422, "usr_id"),
        (b'{"model": "cancer", "inputs": [[1, 2, 3]], "outputs": ["nope"]}', 422, "outputs[0]"),
        (b'{"model": "nope", "inputs": [[1, 2, 3]]}', 404, "model"),
        (b'{"model": "cancer", "inputs": [[1, 2, 3]], "version": "9"}', 404, "version"),
    ],
)  # fmt: skip
def test_bad_bodies(gateway: GatewayThread, body: bytes, status: int, field: str | None) -> None:
    before = len(gateway.running.router.requests)
    answer = predict(gateway, body)
    said = answer.json()
    assert (answer.status_code, said.get("field")) == (status, field), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert said["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    assert len(gateway.running.router.requests) == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP64", "data": ROW}]}, 400),
        ({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}, 400),
        ({"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": ROW}]}, 400),
        ({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, None]}]}, 400),
        ({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32"}]}, 400),
        ({"inputs": [{"name": "y", "shape": [1, 3], "datatype": "FP32", "data": ROW}]}, 400),
        ({"inputs": []}, 400),
        ({}, 400),
    ],
)
def test_bad_v2_bodies(gateway: GatewayThread, body: dict[str, Any], status: int) -> None:
    answer = predict(gateway, body, "/v2/models/cancer/infer")
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "path", ["/v1/predict", "/v2/models/cancer/infer", "/v1/outcomes", "/v2/models/cancer"]
)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": ""}, 401),
        ({"authorization": "Basic abc"}, 401),
        ({"authorization": "Bearer hr_unknownunkno_" + "X" * 43}, 401),
    ],
)
def test_no_key(gateway: GatewayThread, path: str, headers: dict[str, str], status: int) -> None:
    method = "GET" if path.endswith("cancer") else "POST"
    answer = gateway.request(method, path, GOOD if method == "POST" else None, **headers)
    assert answer.status_code == status
    assert answer.headers["www-authenticate"] == "Bearer"
    assert set(answer.json()) >= ({"error"} if path.startswith("/v2") else {"code", "detail", "status"})


@pytest.mark.parametrize(
    ("key", "method", "path", "status"),
    [
        (READ_ONLY, "POST", "/v1/predict", 403),
        (READ_ONLY, "POST", "/v1/outcomes", 403),
        (OTHER_MODEL, "POST", "/v1/predict", 403),
        (OTHER_MODEL, "GET", "/v2/models/cancer", 403),
        (PREDICT_ONLY, "GET", "/v1/models", 403),
        (READ_ONLY, "POST", "/v1/models", 403),
        (READ_ONLY, "GET", "/v1/models", 503),  # allowed; there is no registry here
        (PREDICT_ONLY, "POST", "/v2/repository/models/cancer/load", 403),
    ],
)
def test_scopes(gateway: GatewayThread, key: str, method: str, path: str, status: int) -> None:
    body = GOOD if method == "POST" else None
    answer = gateway.request(method, path, body, authorization=f"Bearer {key}")
    assert answer.status_code == status, answer.text


def test_rate_limit(gateway: GatewayThread) -> None:
    answers = [predict(gateway, GOOD, authorization=f"Bearer {SLOW}") for _ in range(2)]
    assert answers[-1].status_code == 429
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 100  # seconds until the key has a request again
    assert answers[-1].json()["code"] == "RESOURCE_EXHAUSTED"


def test_limits_that_nobody_shares_are_seen(gateway: GatewayThread) -> None:
    """There is no Valkey where it looks for one."""
    url = f"http://127.0.0.1:{gateway.running.gateway.ops_port}/metrics"
    predict(gateway, GOOD, authorization=f"Bearer {SLOW}")
    until(
        lambda: (
            "headrace_gateway_limits_shared 0.0" in httpx.get(url, trust_env=False, timeout=PATIENCE_S).text
        )
    )


@pytest.mark.parametrize(
    ("code", "fields", "native", "v2"),
    [
        (Code.CODE_UNAVAILABLE, {}, 503, 503),
        (Code.CODE_RESOURCE_EXHAUSTED, {"retry_after_ms": 1500}, 429, 429),
        (Code.CODE_DEADLINE_EXCEEDED, {}, 504, 504),
        (Code.CODE_INVALID_ARGUMENT, {"field": "inputs.x"}, 422, 400),
        (Code.CODE_NOT_FOUND, {"field": "version"}, 404, 404),
        (Code.CODE_INTERNAL, {}, 500, 500),
    ],
)
def test_what_the_router_refuses(
    gateway: GatewayThread, code: Code, fields: dict[str, Any], native: int, v2: int
) -> None:
    gateway.running.router.answer = failing(code, "No.", **fields)
    answer = predict(gateway, GOOD)
    assert (answer.status_code, answer.json()["detail"], answer.json().get("field")) == (
        native,
        "No.",
        fields.get("field"),
    )
    if "retry_after_ms" in fields:
        assert answer.headers["retry-after"] == "2"
    body = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": ROW}]}
    answer = predict(gateway, body, "/v2/models/cancer/infer")
    assert answer.status_code == v2
    assert "No." in answer.json()["error"]


def test_deadline(gateway: GatewayThread) -> None:
    gateway.running.router.answer = lambda _request: None
    answer = predict(gateway, GOOD, x_request_timeout_ms="50")
    assert answer.status_code == 504
    for wrong in ("soon", "0", "-1", "1.5", "300001", "1" + "0" * 12, "0" * 11 + "12", "9" * 5000):
        answer = predict(gateway, GOOD, x_request_timeout_ms=wrong)
        assert (answer.status_code, answer.json()["field"]) == (422, "X-Request-Timeout-Ms"), wrong


def test_a_fallback_is_visible_in_both_dialects(gateway: GatewayThread) -> None:
    v2 = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": ROW}]}
    paths = (("/v1/predict", GOOD), ("/v2/models/cancer/infer", json.dumps(v2).encode()))
    for path, body in paths:
        plain = predict(gateway, body, path)
        assert plain.status_code == 200, plain.text
        assert "fallback" not in plain.text
        assert "x-headrace-fallback" not in plain.headers

    def by_fallback(request: PredictRequest) -> PredictReply:
        reply = answer_like_a_worker(request)
        reply.fallback = True
        return reply

    gateway.running.router.answer = by_fallback
    native, oip = (predict(gateway, body, path) for path, body in paths)
    assert native.json()["fallback"] is True
    assert oip.json()["parameters"]["fallback"] is True
    assert oip.headers["x-headrace-fallback"] == "true"


def test_broken_outputs_are_a_plain_500(gateway: GatewayThread) -> None:
    def broken(request: PredictRequest) -> PredictReply:
        reply = answer_like_a_worker(request)
        reply.outputs[0].shape[:] = [7, 7]
        return reply

    gateway.running.router.answer = broken
    answer = predict(gateway, GOOD)
    assert answer.status_code == 500
    assert answer.json()["code"] == "INTERNAL"


# Sizes


@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/cancer/infer"])
def test_large_body_is_refused_and_its_sender_hears_it(gateway: GatewayThread, path: str) -> None:
    answer = predict(gateway, b" " * (_LIMIT + 1), path)
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"


def test_large_chunked_body(gateway: GatewayThread) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (_LIMIT // 16)

    with httpx.Client(base_url=gateway.running.base, trust_env=False, timeout=PATIENCE_S) as client:
        answer = client.post("/v1/predict", content=pieces(), headers={"authorization": f"Bearer {ADMIN}"})
    assert answer.status_code == 413


def test_zip_bomb(gateway: GatewayThread) -> None:
    bomb = gzip.compress(b" " * (4 * _LIMIT))
    assert predict(gateway, bomb, content_encoding="gzip").status_code == 413
    assert predict(gateway, b"not gzip", content_encoding="gzip").status_code == 400
    assert predict(gateway, GOOD, content_encoding="br").status_code == 422


# HTTP/1.1


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(
            message(GOOD, b"Content-Length: %d" % len(GOOD), b"Transfer-Encoding: chunked"), id="cl-te"
        ),
        pytest.param(message(GOOD, *[b"Content-Length: %d" % len(GOOD)] * 2), id="two-lengths"),
        pytest.param(message(GOOD, b"Content-Length: %d, %d" % (len(GOOD), len(GOOD))), id="length-list"),
        pytest.param(message(GOOD, b"Content-Length: +%d" % len(GOOD)), id="signed-length"),
        pytest.param(message(GOOD, b"Content-Length: -1"), id="negative-length"),
        pytest.param(message(GOOD, b"Transfer-Encoding: xchunked"), id="xchunked"),
        pytest.param(message(GOOD, b"Transfer-Encoding: chunked, identity"), id="chunked-not-last"),
        pytest.param(message(GOOD, b"Transfer-Encoding : chunked"), id="space-before-colon"),
        pytest.param(message(GOOD, b"X-A: b\r\n folded"), id="folded"),
        pytest.param(message(GOOD, b"X-A: a\x00b"), id="nul"),
        pytest.param(message(GOOD, b"X-A: a\rb"), id="bare-cr"),
        pytest.param(message(GOOD).replace(b"\r\n", b"\n"), id="bare-lf"),
        pytest.param(message(GOOD, b"Host: other"), id="two-hosts"),
        pytest.param(message(GOOD).replace(b"Host: gateway\r\n", b""), id="no-host"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="tls"),
        pytest.param(b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", id="version"),
        pytest.param(
            message(b"fffffffffffffffff\r\n", b"Transfer-Encoding: chunked"), id="chunk-size-overflow"
        ),
    ],
)
def test_what_is_not_http_is_answered_400_and_closed(gateway: GatewayThread, raw: bytes) -> None:
    before = len(gateway.running.router.requests)
    received = gateway.raw(raw)
    assert received.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"connection: close\r\n" in received
    assert b"application/problem+json" in received
    assert received.count(b"HTTP/1.1 ") == 1
    assert not received.endswith(b"<open>")
    assert len(gateway.running.router.requests) == before


def test_pipelined_requests_are_answered_in_order(gateway: GatewayThread) -> None:
    slow: list[PredictRequest] = []
    held = threading.Event()

    def first_waits(request: PredictRequest) -> PredictReply | None:
        if request.unit == "slow":
            slow.append(request)
            held.set()
            return None
        return answer_like_a_worker(request)

    gateway.running.router.answer = first_waits
    requests = b"".join(
        [
            message(json.dumps({"model": "cancer", "inputs": [ROW], "user_id": "slow"}).encode()),
            message(b"{", path=b"/v1/predict"),
            b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n",
            message(json.dumps({"model": "cancer", "inputs": [[20, 1, 1]]}).encode()),
            b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n",
            b"nonsense\r\n\r\n",
        ]
    )
    with socket.create_connection(("127.0.0.1", gateway.running.port), PATIENCE_S) as connection:
        connection.sendall(requests)
        assert held.wait(PATIENCE_S)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        reply = answer_like_a_worker(slow[0])

        async def answer() -> None:
            gateway.running.router.peers[-1].reply(reply)

        gateway.run(answer())
        connection.settimeout(PATIENCE_S)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    statuses = [part.split(b" ")[0] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"400", b"200", b"200", b"200", b"400"]
    assert received.index(b'"benign"') < received.index(b'{"live":true}') < received.index(b'"malignant"')


def test_a_flood_of_pipelined_requests(gateway: GatewayThread) -> None:
    count = 3000
    bad = message(b"{", key=PREDICT_ONLY)
    with socket.create_connection(("127.0.0.1", gateway.running.port), PATIENCE_S) as connection:
        sender = threading.Thread(target=connection.sendall, args=(message(GOOD) + bad * count,))
        sender.start()
        connection.settimeout(PATIENCE_S)
        received, seen = b"", 0
        while seen < count + 1:
            chunk = connection.recv(1 << 20)
            assert chunk
            received += chunk
            seen = received.count(b"HTTP/1.1 ")
        sender.join()
    assert received.count(b"HTTP/1.1 400") == count


@pytest.mark.parametrize("path", [b"/v1/predict", b"/v1/predict?x=1", b"/v1/%70redict"])
def test_byte_by_byte_and_chunked(gateway: GatewayThread, path: bytes) -> None:
    body = b"".join(b"%x\r\n%s\r\n" % (len(GOOD[i : i + 7]), GOOD[i : i + 7]) for i in range(0, len(GOOD), 7))
    raw = message(
        body + b"0\r\nAuthorization: Bearer nonsense\r\n\r\n", b"Transfer-Encoding: chunked", path=path
    )
    with socket.create_connection(("127.0.0.1", gateway.running.port), PATIENCE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(len(raw)):
            connection.sendall(raw[index : index + 1])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_expect_continue(gateway: GatewayThread) -> None:
    raw = message(GOOD, b"Expect: 100-continue")
    head, body = raw[: -len(GOOD)], raw[-len(GOOD) :]
    with socket.create_connection(("127.0.0.1", gateway.running.port), PATIENCE_S) as connection:
        connection.sendall(head)
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("raw", "closes"),
    [
        (message(GOOD), False),
        (message(GOOD, b"Connection: close"), True),
        (message(GOOD).replace(b"HTTP/1.1", b"HTTP/1.0"), True),
        (message(GOOD, b"Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"), True),
    ],
)
def test_keep_alive(gateway: GatewayThread, raw: bytes, closes: bool) -> None:
    received = gateway.raw(raw, stays=0 if closes else 1)
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert (b"connection: close\r\n" in received) == closes
    assert received.endswith(b"<open>") != closes


@pytest.mark.parametrize("path", [b"/v1/predict", b"/v1/predict?"])
def test_a_client_that_only_stops_sending_gets_its_answer(gateway: GatewayThread, path: bytes) -> None:
    received = gateway.raw(message(GOOD).replace(b"/v1/predict", path), shut=True)
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert not received.endswith((b"<open>", b"<reset>"))


def test_many_outcomes_are_read_beside_the_loop(
    gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def noting(*arguments: Any) -> list[Outcome]:
        names.append(threading.current_thread().name)
        return parse_outcomes(*arguments)

    monkeypatch.setattr("services.gateway.rest.app.parse_outcomes", noting)
    for count in (1, 2000):
        given = [{"request_id": f"{index:032x}", "label": 1} for index in range(count)]
        answer = gateway.request("POST", "/v1/outcomes", json.dumps(given).encode())
        assert (answer.status_code, answer.json()["accepted"]) == (202, count)
    assert names[0] == "gateway"
    assert names[1] != "gateway"


def test_a_client_that_leaves_cancels_its_item(gateway: GatewayThread) -> None:
    arrived = threading.Event()

    def never(_request: PredictRequest) -> None:
        arrived.set()

    gateway.running.router.answer = never
    before = len(gateway.running.router.cancelled)
    connection = socket.create_connection(("127.0.0.1", gateway.running.port), PATIENCE_S)
    connection.sendall(message(GOOD))
    assert arrived.wait(PATIENCE_S)
    connection.close()
    until(lambda: len(gateway.running.router.cancelled) > before)
    assert gateway.running.router.cancelled[before:] == [gateway.running.router.requests[-1].id]


def test_upgrade_is_declined(gateway: GatewayThread) -> None:
    received = gateway.raw(message(GOOD, b"Connection: Upgrade", b"Upgrade: h2c"), stays=1)
    assert received.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/cancer/infer", "/v1/embed"])
def test_wrong_method(gateway: GatewayThread, path: str) -> None:
    answer = gateway.request("GET", path)
    assert answer.status_code == 405
    assert len(answer.headers["x-request-id"]) == 32


# Outcomes and the rest


def test_outcomes_are_acknowledged_by_the_bus(gateway: GatewayThread) -> None:
    request_id = "ab" * 16
    body = {"request_id": request_id, "label": "benign", "row": 2}
    answer = gateway.request("POST", "/v1/outcomes", body)
    assert (answer.status_code, answer.json()["accepted"]) == (202, 1)
    again = gateway.request("POST", "/v1/outcomes", body)
    assert again.json()["event_ids"] == answer.json()["event_ids"]
    listed = [{"request_id": request_id, "metric": "clicks", "value": 3, "event_id": "e-1"}]
    assert gateway.request("POST", "/v1/outcomes", json.dumps(listed).encode()).status_code == 202
    records = [
        record
        for partition in gateway.running.bus._logs[OUTCOMES.name]
        for record in partition
        if record.key == bytes.fromhex(request_id)
    ]
    outcomes = [one for record in records for one in OutcomeBatch.FromString(record.value or b"").outcomes]
    assert [(one.metric, one.text, one.number, one.row) for one in outcomes[-2:]] == [
        ("label", "benign", 0.0, 2),
        ("clicks", "", 3.0, 0),
    ]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b'{"request_id": "x", "label": 1}', 422, "request_id"),
        (b'[{"request_id": "%s", "label": null}]' % (b"0" * 32), 422, "[0].label"),
        (b'{"request_id": "%s", "metric": "m"}' % (b"0" * 32), 422, "value"),
        (b'{"request_id": "%s", "label": [1]}' % (b"0" * 32), 422, "label"),
        (b'{"label": 1}', 422, "request_id"),
        (b'{"request_id": "%s", "label": 1, "model": "%s"}' % (b"0" * 32, b"m" * 5000), 422, "model"),
        (b'{"request_id": "%s", "label": 1, "model": "A b"}' % (b"0" * 32), 422, "model"),
        (b'{"request_id": "%s", "metric": "%s", "value": 1}' % (b"0" * 32, b"m" * 129), 422, "metric"),
        (b'{"request_id": "%s", "metric": "a\\u0000", "value": 1}' % (b"0" * 32), 422, "metric"),
        (b'{"request_id": "%s", "label": "%s"}' % (b"0" * 32, "ä".encode() * 513), 422, "label"),
        (b'{"request_id": "%s", "label": "a\\u0000"}' % (b"0" * 32), 422, "label"),
        (b"[]", 422, None),
        (b"{", 400, None),
    ],
)
def test_bad_outcomes(gateway: GatewayThread, body: bytes, status: int, field: str | None) -> None:
    answer = gateway.request("POST", "/v1/outcomes", body)
    assert (answer.status_code, answer.json().get("field")) == (status, field), answer.text


def test_an_event_id_is_one_among_the_outcomes_of_a_request(gateway: GatewayThread) -> None:
    """The same name, or the same id, for another request, metric or row is another outcome."""
    for event_id in ("purchase", "ab" * 16):
        about = [("0" * 32, "a", 0), ("0" * 32, "a", 1), ("0" * 32, "b", 0), ("1" * 32, "a", 0)]
        listed = [
            {"request_id": request_id, "metric": metric, "row": row, "value": 1, "event_id": event_id}
            for request_id, metric, row in about
        ]
        listed.append({**listed[0], "value": 2})
        ids = gateway.request("POST", "/v1/outcomes", json.dumps(listed).encode()).json()["event_ids"]
        assert len(set(ids[:4])) == 4
        assert ids[4] == ids[0]


@pytest.mark.parametrize(("model", "status"), [("digits", 202), ("cancer", 403), (None, 403)])
def test_outcomes_of_a_key_for_some_models(gateway: GatewayThread, model: str | None, status: int) -> None:
    body = {"request_id": "0" * 32, "label": 1} | ({"model": model} if model else {})
    answer = gateway.request("POST", "/v1/outcomes", body, authorization=f"Bearer {OTHER_MODEL}")
    assert answer.status_code == status, answer.text


def test_outcomes_while_the_broker_is_away(gateway: GatewayThread) -> None:
    gateway.running.bus.away = True
    answer = gateway.request("POST", "/v1/outcomes", {"request_id": "0" * 32, "label": 1})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert predict(gateway, GOOD).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/deployments/a", "/v1/keys", "/v1/analytics/x", "/v1/drift/y"]
)
def test_services_behind_the_door_away(gateway: GatewayThread, path: str) -> None:
    answer = gateway.request("GET", path)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["content-type"] == "application/problem+json"


def test_openapi_names_every_public_route(gateway: GatewayThread) -> None:
    document = gateway.request("GET", "/openapi.json").json()
    paths = document["paths"]
    for path in (
        "/v1/predict",
        "/api/v1/predict",
        "/v1/models/{model}/predict",
        "/v1/embed",
        "/v1/outcomes",
        "/v2/models/{model}/infer",
        "/v2/models/{model}/versions/{version}/infer",
        "/v2/repository/index",
        "/health/ready",
    ):
        assert path in paths
    body = paths["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(PredictBody.__struct_fields__)
    assert {"200", "400", "401", "413", "422", "429", "503"} <= set(paths["/v1/predict"]["post"]["responses"])
    operations = [one["operationId"] for path in paths.values() for one in path.values()]
    assert len(operations) == len(set(operations))
    # Errors look as we answer them, not as FastAPI would, and V2 has no 422 at all.
    assert "HTTPValidationError" not in json.dumps(document)
    assert not [
        path
        for path, methods in paths.items()
        for one in methods.values()
        if path.startswith("/v2") and "422" in one["responses"]
    ]


def test_metrics_count_by_route_model_and_status(gateway: GatewayThread) -> None:
    predict(gateway, GOOD)
    gateway.request("GET", "/v2/models/cancer")
    gateway.request("GET", "/no/such/path")
    url = f"http://127.0.0.1:{gateway.running.gateway.ops_port}/metrics"
    text = httpx.get(url, trust_env=False, timeout=PATIENCE_S).text
    assert 'headrace_gateway_requests_total{model="cancer",route="predict",status="200"}' in text
    assert 'headrace_gateway_request_seconds_bucket{le="+Inf",model="cancer",route="predict"}' in text
    assert 'headrace_gateway_requests_total{model="",route="/v2/models/{model}",status="200"}' in text
    assert 'headrace_gateway_requests_total{model="",route="none",status="404"}' in text
    assert "/no/such/path" not in text


@pytest.mark.parametrize("path", ["/v1/outcomes", "/v1/batch", "/v2/repository/index"])
def test_who_leaves_before_the_body_is_whole_makes_no_failure_of_ours(
    gateway: GatewayThread, path: str
) -> None:
    def answered(status: int) -> bool:
        url = f"http://127.0.0.1:{gateway.running.gateway.ops_port}/metrics"
        text = httpx.get(url, trust_env=False, timeout=PATIENCE_S).text
        return f'headrace_gateway_requests_total{{model="",route="{path}",status="{status}"}}' in text

    with socket.create_connection(("127.0.0.1", gateway.running.port), PATIENCE_S) as leaving:
        leaving.sendall(message(b" " * 100, path=path.encode())[:-50])
    until(lambda: answered(499) or answered(500))
    assert not answered(500)


def test_a_restricted_key_is_shown_its_own_models_only(gateway: GatewayThread) -> None:
    def index(key: str) -> set[str]:
        answer = gateway.request("POST", "/v2/repository/index", {}, authorization=f"Bearer {key}")
        return {entry["name"] for entry in answer.json()}

    assert index(PREDICT_ONLY) == {"cancer", "embedder", "mixed"}
    assert index(OTHER_MODEL) == set()


def test_statistics_of_all_models_are_those_that_a_key_may_use(gateway: GatewayThread) -> None:
    def named(key: str) -> list[str]:
        answer = gateway.request("GET", "/v2/models/stats", authorization=f"Bearer {key}")
        assert answer.status_code == 200, answer.text
        return [one["name"] for one in answer.json()["model_stats"]]

    assert named(PREDICT_ONLY) == ["cancer", "cancer", "embedder", "mixed"]
    assert named(OTHER_MODEL) == []
    assert gateway.request("GET", "/v2/models/stats", authorization="Bearer hr_nobody").status_code == 401


def test_the_server_says_its_version(gateway: GatewayThread) -> None:
    project = tomllib.loads(Path("services/gateway/pyproject.toml").read_text())["project"]
    assert gateway.request("GET", "/v2").json()["version"] == project["version"]


@pytest.mark.parametrize(
    ("level", "status", "priority"),
    [
        (0, 200, Priority.PRIORITY_UNSPECIFIED),
        (1, 200, Priority.PRIORITY_HIGH),
        (2, 200, Priority.PRIORITY_NORMAL),
        (9, 200, Priority.PRIORITY_LOW),
        (-1, 400, None),
        (True, 400, None),
        (1.5, 400, None),
    ],
)
def test_triton_says_priorities_by_number(
    gateway: GatewayThread, level: object, status: int, priority: Priority | None
) -> None:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": ROW}
    asked = {"inputs": [tensor], "parameters": {"priority": level}}
    for _ in range(3):  # what is learned of a form says the same
        answer = gateway.request("POST", "/v2/models/cancer/infer", asked)
        assert answer.status_code == status, answer.text
        assert priority is None or gateway.running.router.requests[-1].priority == priority


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/v1/predict", {"model": "cancer", "inputs": [ROW], "priority": "low"}, {}),
        ("/v1/predict", {"model": "cancer", "inputs": [ROW]}, {"X-Request-Priority": "low"}),
        (
            "/v1/predict",
            {"model": "cancer", "inputs": [ROW], "priority": "high"},
            {"X-Request-Priority": "low"},
        ),
        (
            "/v2/models/cancer/infer",
            {
                "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": ROW}],
                "parameters": {"priority": "low"},
            },
            {},
        ),
    ],
)
def test_a_priority_goes_with_the_request(
    gateway: GatewayThread, path: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    assert gateway.request("POST", path, body, **headers).status_code == 200
    assert gateway.running.router.requests[-1].priority == Priority.PRIORITY_LOW


@pytest.mark.parametrize(
    ("body", "headers", "status", "field"),
    [
        ({"model": "cancer", "inputs": [ROW], "priority": "urgent"}, {}, 422, "priority"),
        ({"model": "cancer", "inputs": [ROW], "priority": 1}, {}, 422, "priority"),
        ({"model": "cancer", "inputs": [ROW]}, {"X-Request-Priority": "1"}, 422, "X-Request-Priority"),
    ],
)
def test_another_priority_is_refused(
    gateway: GatewayThread, body: dict[str, Any], headers: dict[str, str], status: int, field: str
) -> None:
    answer = gateway.request("POST", "/v1/predict", body, **headers)
    assert (answer.status_code, answer.json()["field"]) == (status, field)
