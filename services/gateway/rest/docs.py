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
from services.gateway.rest.management import Upstream

_WITHIN_S = 2.0
#: How long a document is given out before the services are asked again: anybody may read it.
_FRESH_S = 30.0
_REFERENCE = "#/components/schemas/"

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
    paths = dict(own["paths"])
    schemas = dict(own.get("components", {}).get("schemas", {}))
    for name, document in others.items():
        moved = orjson.loads(
            orjson.dumps(document).replace(_REFERENCE.encode(), f"{_REFERENCE}{name}.".encode())
        )
        for path, operations in moved.get("paths", {}).items():
            if path.startswith("/v1/"):
                paths[path] = {method: _of(name, one) for method, one in operations.items()}
        for schema, said in moved.get("components", {}).get("schemas", {}).items():
            schemas[f"{name}.{schema}"] = said
    return {**own, "paths": paths, "components": {**own.get("components", {}), "schemas": schemas}}


def _of(name: str, operation: Document) -> Document:
    marked = {**operation, "tags": operation.get("tags") or [name]}
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
