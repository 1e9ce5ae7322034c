"""One documentation of all: what the gateway answers itself, and what the services behind its door do."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import orjson
from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import RedirectResponse, Response

from services.common.clock import Clock
from services.gateway.rest.documents import PROBLEM
from services.gateway.rest.management import Upstream

_WITHIN_S = 2.0
#: How long a document is given out before the services are asked again: anybody may read it.
_FRESH_S = 30.0
_REFERENCE = "#/components/schemas/"
#: What FastAPI says of a 422 by itself; nobody here answers with it.
_UNUSED = ("HTTPValidationError", "ValidationError")
_WRONG_FIELD = {
    "description": "A field is wrong; `field` names it.",
    "content": {"application/problem+json": {"schema": PROBLEM}},
}

Document = dict[str, Any]


def docs_routes(
    app: FastAPI, client: httpx.AsyncClient, services: tuple[Upstream, ...], clock: Clock
) -> APIRouter:
    """`/openapi.json` and `/docs`; `/` leads there."""
    router = APIRouter(include_in_schema=False)
    asking = asyncio.Lock()
    kept: bytes = b""
    kept_until = 0.0

    @router.get("/openapi.json")
    async def openapi() -> Response:
        nonlocal kept, kept_until
        async with asking:
            if clock.monotonic() >= kept_until:
                told = await asyncio.gather(*(_told_by(client, service) for service in services))
                named = zip((service.name for service in services), told, strict=True)
                kept = orjson.dumps(
                    combined(app.openapi(), {name: document for name, document in named if document})
                )
                kept_until = clock.monotonic() + _FRESH_S
        return Response(kept, media_type="application/json")

    @router.get("/docs")
    async def docs() -> Response:
        return get_swagger_ui_html(openapi_url="/openapi.json", title=app.title)

    @router.get("/")
    async def root() -> Response:
        return RedirectResponse("/docs")

    return router


def combined(own: Document, others: dict[str, Document]) -> Document:
    """`own` with the paths below `/v1/` of `others`, by name; their schemas get that name in front. A path
    that both know is as the other says."""
    paths = {path: {method: _said(one) for method, one in it.items()} for path, it in own["paths"].items()}
    schemas = _used(own)
    for name, document in others.items():
        moved = orjson.loads(
            orjson.dumps(document).replace(_REFERENCE.encode(), f"{_REFERENCE}{name}.".encode())
        )
        for path, operations in moved.get("paths", {}).items():
            if path.startswith("/v1/"):
                paths[path] = {method: _of(name, one) for method, one in operations.items()}
        for schema, said in _used(moved).items():
            schemas[f"{name}.{schema}"] = said
    return {**own, "paths": paths, "components": {**own.get("components", {}), "schemas": schemas}}


def _used(document: Document) -> Document:
    schemas = document.get("components", {}).get("schemas", {})
    return {name: schema for name, schema in schemas.items() if name not in _UNUSED}


def _said(operation: Document) -> Document:
    """`operation` with what its 422 looks like: a problem, and none where other protocols are spoken. Without
    the headers by which the gateway tells services who asks: callers' own are dropped."""
    responses = dict(operation.get("responses", {}))
    if _UNUSED[0] in orjson.dumps(responses.get("422")).decode():
        if {"openai", "open inference protocol"} & set(operation.get("tags", ())):
            del responses["422"]
        else:
            responses["422"] = _WRONG_FIELD
    said = {**operation, "responses": responses}
    if "parameters" in operation:
        said["parameters"] = [
            one for one in operation["parameters"] if not one["name"].startswith("x-headrace-")
        ]
    return said


def _of(name: str, operation: Document) -> Document:
    marked = {**_said(operation), "tags": operation.get("tags") or [name]}
    if "operationId" in operation:
        marked["operationId"] = f"{name}_{operation['operationId']}"
    return marked


async def _told_by(client: httpx.AsyncClient, service: Upstream) -> Document | None:
    """What `service` says of itself; None where it does not."""
    try:
        answer = await client.get(f"{service.base_url}/openapi.json", timeout=_WITHIN_S)
        document = orjson.loads(answer.content) if answer.status_code == 200 else None
    except (httpx.HTTPError, orjson.JSONDecodeError):
        return None
    return document if isinstance(document, dict) else None
