"""`POST /v1/models/{model}/predict:async` and `GET /v1/async/{id}`."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from services.common.clock import Clock
from services.common.errors import InvalidArgument
from services.gateway.jobs.async_requests import AsyncRequests
from services.gateway.keys import KeyRing, Scope
from services.gateway.reading import BodyBudget
from services.gateway.rest.door import authenticated, bounded_body

_MAX_WAIT_S = 60.0


def async_routes(
    requests: AsyncRequests, keys: KeyRing, clock: Clock, bodies: BodyBudget, max_body_bytes: int
) -> APIRouter:
    """Routes for predictions that are answered later."""
    router = APIRouter(tags=["batch"])

    @router.post(
        "/v1/models/{model}/predict:async",
        status_code=202,
        summary="Predict, and answer later by id or callback",
    )
    async def submit(request: Request, model: str) -> Response:
        caller = authenticated(request, keys, Scope.PREDICT, clock.monotonic())
        body = await bounded_body(request, max_body_bytes, bodies)
        job = await requests.submit(model, body, caller, request.headers.get("idempotency-key", ""))
        answer = {"id": job.job_id, "request_id": job.job_id, "status": job.state}
        return _json(answer, 202)

    @router.get("/v1/async/{request_id}", summary="The answer; with wait_s, once it is there")
    async def result(request: Request, request_id: str) -> Response:
        caller = authenticated(request, keys, Scope.PREDICT, clock.monotonic())
        wait_s = _wait_s(request.query_params.get("wait_s", "0"))
        job = await requests.get(request_id, caller)
        if wait_s and not job.ended:
            try:
                async with asyncio.timeout(wait_s):
                    job = await requests.ended(job)
            except TimeoutError:
                job = await requests.get(request_id, caller)
        return _json(await requests.shown(job))

    return router


def _wait_s(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_WAIT_S:
        raise InvalidArgument(f"wait_s must be 0 … {_MAX_WAIT_S:g}.", field="wait_s")
    return seconds


def _json(body: dict[str, Any], status: int = 200) -> Response:
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, media_type="application/json")
