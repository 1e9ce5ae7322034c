"""The document of all routes says what callers can send, and how nonsense is answered."""

from __future__ import annotations

import json

import httpx
import pytest
from fastapi import FastAPI

from services.common.problems import install_problem_handlers
from services.gateway.rest.docs import combined


def service() -> FastAPI:
    """One whose framework looks at a query."""
    app = FastAPI()
    install_problem_handlers(app)

    @app.get("/v1/things", tags=["things"])
    async def things(limit: int) -> int:
        return limit

    return app


@pytest.mark.parametrize("behind", [True, False], ids=["behind the gateway", "its own"])
async def test_a_wrong_field_is_told_as_it_is_answered(behind: bool) -> None:
    app = service()
    own = {"paths": {}} if behind else app.openapi()
    document = combined(own, {"registry": app.openapi()} if behind else {})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        answer = await client.get("/v1/things?limit=many")
    assert answer.status_code == 422
    responses = document["paths"]["/v1/things"]["get"]["responses"]
    ((kind, told),) = responses["422"]["content"].items()
    assert answer.headers["content-type"] == kind
    assert answer.json().keys() - {"request_id"} == told["schema"]["properties"].keys() - {"request_id"}
    assert set(told["schema"]["required"]) <= answer.json().keys()
    assert "ValidationError" not in json.dumps(document)


def test_what_the_gateway_tells_services_is_nothing_to_send() -> None:
    given = [{"name": "x-headrace-scopes", "in": "header"}, {"name": "limit", "in": "query"}]
    document = combined({"paths": {}}, {"drift": {"paths": {"/v1/x": {"get": {"parameters": given}}}}})
    assert document["paths"]["/v1/x"]["get"]["parameters"] == given[1:]


def test_who_speaks_otherwise_has_no_422() -> None:
    said = {"$ref": "#/components/schemas/HTTPValidationError"}
    responses = {"200": {}, "422": {"content": {"application/json": {"schema": said}}}}
    for tag in ("openai", "open inference protocol"):
        own = {"paths": {"/x": {"get": {"tags": [tag], "responses": responses}}}}
        assert combined(own, {})["paths"]["/x"]["get"]["responses"] == {"200": {}}
