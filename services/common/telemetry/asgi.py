"""One span per HTTP request of an ordinary (not hot) ASGI service."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanKind

from services.common.telemetry.propagation import parse_traceparent
from services.common.telemetry.tracing import Tracing

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_UNTRACED = ("/health/", "/metrics")


class TraceRequests:
    """ASGI middleware: continues the caller's `traceparent`, makes the span current (logs inside carry its
    ids) and records it with method, route template and status. Health checks and scrapes are left out."""

    def __init__(self, app: App, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_UNTRACED):
            await self._app(scope, receive, send)
            return
        parent = next((parse_traceparent(v) for k, v in scope["headers"] if k == b"traceparent"), None)
        context = self._tracing.start(parent)
        if context is None:
            await self._app(scope, receive, send)
            return
        status = 500

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        begun = time.time_ns()
        try:
            with trace.use_span(
                NonRecordingSpan(context), record_exception=False, set_status_on_exception=False
            ):
                await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", None)
            self._tracing.record_span(
                f"{scope['method']} {route}" if route else scope["method"],
                begun,
                time.time_ns(),
                parent,
                attributes={
                    "http.request.method": scope["method"],
                    "http.response.status_code": status,
                    **({"http.route": route} if route else {}),
                },
                context=context,
                kind=SpanKind.SERVER,
                error=f"HTTP {status}" if status >= 500 else None,
            )
