"""Counts and times HTTP requests by route template, which is a bounded set; unknown paths are one."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.registry.metrics import Metrics


class MeasureRequests:
    """ASGI middleware around the routes."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        begun = time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            seconds = time.perf_counter() - begun
            self._metrics.http_requests.labels(scope["method"], route, str(status)).inc()
            self._metrics.http_seconds.labels(scope["method"], route).observe(seconds)
