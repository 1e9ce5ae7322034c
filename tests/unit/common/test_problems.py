from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from headrace.v1.tensor_pb2 import Code
from pydantic import BaseModel

from services.common import errors
from services.common.credential import accepts, bearer
from services.common.internal_auth import InternalAuth
from services.common.problems import (
    HTTP_STATUS,
    http_status,
    install_problem_handlers,
    oip_problem,
    problem,
    problem_headers,
)

_TOKEN = "0123456789abcdef"


class Weight(BaseModel):
    weight: int


class Body(BaseModel):
    weights: list[Weight]


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()

    @app.post("/things/{number}")
    async def create(number: int, body: Body) -> dict[str, int]:
        return {"made": number + len(body.weights)}

    @app.get("/crash")
    async def crash() -> None:
        raise ValueError("password=hunter2")

    @app.get("/busy")
    async def busy() -> None:
        raise errors.ResourceExhausted("Too much at once.", retry_after_ms=1500)

    install_problem_handlers(app)
    app.add_middleware(InternalAuth, token=_TOKEN)
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    headers = {"authorization": bearer(_TOKEN)}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        yield client


def _problem(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == response.status_code
    assert body["type"] == "about:blank"
    return body


def test_every_code_has_a_status_and_every_error_a_problem() -> None:
    assert set(HTTP_STATUS) == set(Code.values())
    for code in HTTP_STATUS:
        error = errors.error_of(code, "It went wrong.", field="x")
        status, body = problem(error, "abc")
        decoded = json.loads(body)
        assert status == decoded["status"] >= 400
        assert decoded["detail"] == "It went wrong."
        assert decoded["request_id"] == "abc"
        assert decoded["title"]
        assert oip_problem(error)[0] >= 400


@pytest.mark.parametrize(
    ("error", "status", "oip_status"),
    [
        (errors.InvalidArgument("m"), 422, 400),
        (errors.MalformedBody("m"), 400, 400),
        (errors.BodyTooLarge("m"), 413, 413),
        (errors.Unauthenticated("m"), 401, 401),
        (errors.PermissionDenied("m"), 403, 403),
        (errors.NotFound("m"), 404, 404),
        (errors.AlreadyExists("m"), 409, 400),
        (errors.FailedPrecondition("m"), 409, 400),
        (errors.ResourceExhausted("m"), 429, 429),
        (errors.DeadlineExceeded("m"), 504, 504),
        (errors.Unavailable("m"), 503, 503),
        (errors.Unimplemented("m"), 501, 501),
        (errors.Internal("m"), 500, 500),
        (errors.DataLoss("m"), 500, 500),
        (errors.Cancelled("m"), 499, 503),
    ],
)
def test_statuses(error: errors.HeadraceError, status: int, oip_status: int) -> None:
    assert http_status(error) == status
    assert oip_problem(error) == (oip_status, b'{"error": "m"}')


def test_the_oip_sentence_names_the_field_once() -> None:
    unnamed = errors.InvalidArgument("expected FP32", field="inputs.x")
    named = errors.InvalidArgument("inputs.x expects FP32", field="inputs.x")
    assert json.loads(oip_problem(unnamed)[1])["error"] == "inputs.x: expected FP32"
    assert json.loads(oip_problem(named)[1])["error"] == "inputs.x expects FP32"


def test_headers_say_when_to_come_back() -> None:
    assert (b"retry-after", b"2") in problem_headers(errors.Unavailable("m", retry_after_ms=1001))
    assert (b"www-authenticate", b"Bearer") in problem_headers(errors.Unauthenticated("m"))
    assert problem_headers(errors.NotFound("m")) == [(b"content-type", b"application/problem+json")]


async def test_validation_names_the_field(client: httpx.AsyncClient) -> None:
    response = await client.post("/things/1", json={"weights": [{"weight": 1}, {"weight": "x"}]})
    body = _problem(response)
    assert (response.status_code, body["code"]) == (422, "INVALID_ARGUMENT")
    assert body["field"] == "weights[1].weight"
    body = _problem(await client.post("/things/one", json={}))
    assert {entry["field"] for entry in body["errors"]} == {"number", "weights"}


async def test_a_body_that_is_not_json_is_400(client: httpx.AsyncClient) -> None:
    response = await client.post("/things/1", content="{", headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "field" not in _problem(response)


async def test_the_router_speaks_the_same_shape(client: httpx.AsyncClient) -> None:
    assert _problem(await client.get("/nowhere"))["code"] == "NOT_FOUND"
    response = await client.get("/things/1")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert _problem(response)["title"] == "Method Not Allowed"


async def test_an_unknown_exception_says_nothing(client: httpx.AsyncClient) -> None:
    response = await client.get("/crash")
    assert response.status_code == 500
    assert _problem(response)["code"] == "INTERNAL"
    assert "hunter2" not in response.text


async def test_our_own_errors_keep_their_headers(client: httpx.AsyncClient) -> None:
    response = await client.get("/busy")
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")
    assert _problem(response)["detail"] == "Too much at once."


@pytest.mark.parametrize("header", ["", "Bearer wrong", _TOKEN, f"Basic {_TOKEN}", f"Bearer {_TOKEN}x"])
async def test_without_the_token_nothing_is_reached(client: httpx.AsyncClient, header: str) -> None:
    response = await client.get("/busy", headers={"authorization": header})
    assert response.status_code == 401
    assert _problem(response)["code"] == "UNAUTHENTICATED"


async def test_health_needs_no_token(client: httpx.AsyncClient) -> None:
    response = await client.get("/health/live", headers={"authorization": ""})
    assert response.status_code == 404  # past the credential: this application has no such route


def test_credentials() -> None:
    assert accepts(b"bearer " + _TOKEN.encode(), _TOKEN)
    assert accepts(bearer(_TOKEN), _TOKEN)
    assert not accepts(None, _TOKEN)
    assert not accepts("Bearer é", _TOKEN)
    with pytest.raises(ValueError, match="empty"):
        InternalAuth(lambda *_: None, "")  # type: ignore[arg-type]  # never called
