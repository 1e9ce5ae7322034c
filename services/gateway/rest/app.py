"""The FastAPI application, composed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx
import orjson
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.bus import Bus
from services.common.clock import Clock
from services.common.lifecycle import Health
from services.common.telemetry import Tracing
from services.common.telemetry.asgi import TraceRequests
from services.gateway.catalogue import Catalogue
from services.gateway.jobs.async_requests import AsyncRequests
from services.gateway.jobs.openai_runtime import OpenAIParts
from services.gateway.jobs.service import JobService
from services.gateway.keys import KeyRing
from services.gateway.keys import Scope as KeyScope
from services.gateway.metrics import GatewayMetrics
from services.gateway.pools import Pools
from services.gateway.predict import PredictService
from services.gateway.rest.async_routes import async_routes
from services.gateway.rest.batch import JobRoutes
from services.gateway.rest.dead_letter_routes import DeadLetterOffice, dead_letter_routes
from services.gateway.rest.docs import docs_routes
from services.gateway.rest.door import RequestIds, authenticated, bounded_body, install_errors
from services.gateway.rest.hot_routes import hot_routes
from services.gateway.rest.management import Upstream, management_routes
from services.gateway.rest.openai_routes import openai_routes
from services.gateway.rest.outcomes import parse_outcomes, publish_outcomes
from services.gateway.rest.shared_memory_routes import shared_memory_routes
from services.gateway.rest.v2_routes import server_version, v2_health_routes, v2_routes
from services.gateway.targets import target_of


@dataclass(frozen=True, slots=True)
class Parts:
    """What the application is made of."""

    service: PredictService
    catalogue: Catalogue
    pools: Pools
    keys: KeyRing
    bus: Bus
    health: Health
    metrics: GatewayMetrics
    tracing: Tracing
    clock: Clock
    client: httpx.AsyncClient
    upstreams: tuple[Upstream, ...]
    jobs: JobService
    openai: OpenAIParts
    dead_letters: DeadLetterOffice


def rest_app(parts: Parts) -> ASGIApp:
    """Every REST route of the gateway."""
    app = FastAPI(
        title="Headrace",
        version=server_version(),
        description="Predictions, outcomes and management of a Headrace installation.",
        redirect_slashes=False,
        openapi_url=None,
    )
    app.include_router(hot_routes(parts.service))
    app.include_router(v2_health_routes(parts.health))
    service = parts.service
    app.include_router(
        v2_routes(
            parts.catalogue,
            parts.pools,
            parts.keys,
            parts.health,
            parts.clock,
            service.bodies,
            service.regions,
        )
    )
    app.include_router(shared_memory_routes(service.regions, parts.keys, parts.clock, service.bodies))
    jobs = JobRoutes(parts.jobs, parts.keys, parts.clock, service.limits, service.bodies)
    app.include_router(jobs.router())
    app.include_router(openai_routes(parts.openai, parts.keys, parts.clock, service.bodies))
    later = AsyncRequests(parts.jobs, parts.catalogue)
    app.include_router(
        async_routes(later, parts.keys, parts.clock, service.bodies, service.limits.max_body_bytes)
    )
    app.include_router(dead_letter_routes(parts.dead_letters, parts.keys, parts.clock, service.bodies))
    app.include_router(management_routes(parts.client, parts.upstreams, parts.keys, parts.clock))
    app.include_router(docs_routes(app, parts.client, parts.upstreams, parts.clock))

    @app.post("/v1/outcomes", status_code=202, tags=["outcomes"], summary="Say what became of predictions")
    async def outcomes(request: Request) -> Response:
        caller = authenticated(request, parts.keys, KeyScope.PREDICT, parts.clock.monotonic())
        body = await bounded_body(request, parts.service.limits.max_body_bytes, parts.service.bodies)
        if len(body) > parts.service.limits.inline_bytes:
            given = await asyncio.to_thread(parse_outcomes, body, parts.clock.unix_us(), caller)
        else:
            given = parse_outcomes(body, parts.clock.unix_us(), caller)
        await publish_outcomes(parts.bus, given)
        answer = {"accepted": len(given), "event_ids": [one.event_id.hex() for one in given]}
        return Response(orjson.dumps(answer), 202, media_type="application/json")

    @app.get("/health/live", tags=["health"])
    async def live() -> Response:
        return Response(b'{"live":true}', media_type="application/json")

    @app.get("/health/ready", tags=["health"])
    async def ready() -> Response:
        reasons = parts.health.reasons()
        body = orjson.dumps({"ready": not reasons, "reasons": reasons})
        return Response(body, 503 if reasons else 200, media_type="application/json")

    install_errors(app)
    app.add_middleware(RequestIds)
    return _Observed(app, parts)


class _Observed:
    """One span and one count per ordinary request; the hot ones are observed by `PredictService`, whatever
    brought them."""

    def __init__(self, app: ASGIApp, parts: Parts) -> None:
        self._app = app
        self._traced = TraceRequests(app, parts.tracing)
        self._metrics = parts.metrics
        self._monotonic = parts.clock.monotonic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hot = scope["type"] == "http" and scope["method"] == "POST" and target_of(scope["path"].encode())
        if scope["type"] != "http" or hot:
            await self._app(scope, receive, send)
            return
        status, began = 500, self._monotonic()

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._traced(scope, receive, noting)
        finally:
            # The template, never the path: labels are bounded.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.observe(route, "", status, self._monotonic() - began)
