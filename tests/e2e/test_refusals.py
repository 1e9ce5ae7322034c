"""Bad input gets the right 4xx in the right shape, and is never counted as served."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from deploy.embedded.stack import Stack
from tests.e2e.rest import caller, settled, total
from tests.fixtures.asking import until
from tests.fixtures.waiting import PATIENCE_S, eventually_of

ROW = [1.0] * 30
STRAY = {"name": "y", "shape": [1], "datatype": "FP32", "data": [1]}


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "cancer", "inputs": [ROW]} | changes


BAD = {
    "wrong dtype": (body(inputs=[["one", *ROW[1:]]]), 422, "inputs[0][0]"),
    "too few columns": (body(inputs=[ROW[:-1]]), 422, "inputs[0]"),
    "too deep": (body(inputs=[[ROW]]), 422, "inputs[0]"),
    "a null": (body(inputs=[[None, *ROW[1:]]]), 422, "inputs[0][0]"),
    "no rows": (body(inputs=[]), 422, "inputs"),
    "an unknown column": (body(inputs={"mean radius": [1.0], "height": [1.0]}), 422, "inputs.height"),
    "an unknown tensor": (body(inputs=[STRAY]), 422, None),
    "an unknown model": (body(model="nothing"), 404, "model"),
    "an unknown version": (body(version="77"), 404, "version"),
    "no model": ({"inputs": [ROW]}, 422, "model"),
    "no inputs": ({"model": "cancer"}, 422, "inputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
async def test_a_wrong_request_names_its_field(platform: Stack, case: str) -> None:
    sent, status, field = BAD[case]
    async with caller(platform) as client:
        answer = await client.post("/v1/predict", json=sent)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["request_id"] == answer.headers["x-request-id"]
    if field is not None:
        assert problem["field"] == field
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"model": "cancer", "inputs": [[NaN]]}', 400),
        (b'{"model": "cancer", "inputs": [[1e999' + b",1" * 29 + b"]]}", 422),
        (b"[]", 422),
    ],
)
async def test_a_body_that_is_not_what_it_should_be(platform: Stack, content: bytes, status: int) -> None:
    async with caller(platform) as client:
        headers = {"content-type": "application/json"}
        answer = await client.post("/v1/predict", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["status"] == status


async def test_a_body_of_50_mb_is_refused(platform: Stack) -> None:
    async with caller(platform) as client:
        content = b'{"model": "cancer", "inputs": [[' + b"1," * 25_000_000 + b"1]]}"
        try:
            answer = await client.post("/v1/predict", content=content)
        except httpx.WriteError:  # refused before all of it was read
            return
    assert answer.status_code == 413


async def test_keys_and_scopes_are_asked_for(platform: Stack) -> None:
    async with httpx.AsyncClient(base_url=platform.rest_url, timeout=PATIENCE_S) as nobody:
        assert (await nobody.post("/v1/predict", json=body())).status_code == 401
        wrong = {"x-api-key": "hr_aaaaaaaaaaaa_" + "x" * 43}
        assert (await nobody.post("/v1/predict", json=body(), headers=wrong)).status_code == 401
        assert (await nobody.get("/v1/models")).status_code == 401
    async with caller(platform) as admin:
        made = await admin.post("/v1/keys", json={"name": "reader", "scopes": ["read"]})
        assert made.status_code == 201, made.text
    async with caller(platform, key=made.json()["key"]) as reader:
        # The key travels through Kafka.
        answer = await eventually_of(lambda: reader.get("/v1/models"), lambda said: said.status_code != 401)
        assert answer.status_code == 200
        assert (await reader.post("/v1/predict", json=body())).status_code == 403
        assert (await reader.post("/v1/keys", json={"name": "x", "scopes": ["admin"]})).status_code == 403


async def test_open_inference_errors_have_their_own_shape(platform: Stack) -> None:
    async with caller(platform) as client:
        missing = await client.post("/v2/models/nothing/infer", json={"inputs": []})
        tensor = {"name": "features", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
        wrong = await client.post("/v2/models/cancer/infer", json={"inputs": [tensor]})
    assert (missing.status_code, set(missing.json())) == (404, {"error"})
    assert (wrong.status_code, set(wrong.json())) == (400, {"error"})
    assert "features" in wrong.json()["error"]


async def test_nothing_refused_is_counted_as_served(platform: Stack) -> None:
    async with caller(platform) as client:
        before = await settled(platform, client, "cancer")
        for sent, _, _ in BAD.values():
            await client.post("/v1/predict", json=sent)
        answer = await client.post("/v1/predict", json=body())
        assert answer.status_code == 200, answer.text
        await until(client, "/v1/analytics/models/cancer", lambda shown: total(shown) > before)
        assert await settled(platform, client, "cancer") == before + 1
