"""`/health/live`, `/health/ready` and `/metrics` as plain ASGI, so that a service without a web framework
has them."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from services.common.lifecycle.health import Health

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_JSON = "application/json"
#: Which process answers: two may share the port while one takes over from the other.
PROCESS_HEADER = b"x-process"


class OpsEndpoints:
    """ASGI middleware that answers the three paths and hands everything else on.

    `/health/live` is 200 while the loop turns. `/health/ready` is 200 or 503 with
    `{"ready": bool, "reasons": {part: reason}}`. `/metrics` speaks Prometheus text or OpenMetrics and adds
    what the process uses (`process_cpu_seconds_total`, `process_resident_memory_bytes`, …) to `registry`,
    unless `guest`: the service lives in the process of another, which says so, and two targets that export
    one process would count it twice in every sum. Added last, it stands before any authentication.
    """

    def __init__(self, app: App, health: Health, registry: CollectorRegistry, *, guest: bool = False) -> None:
        self._app = app
        self._health = health
        self._registry = registry
        if not guest:
            ProcessCollector(registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answers(scope)
        if answer is None:
            await self._app(scope, receive, send)
        elif scope["method"] not in {"GET", "HEAD"}:
            await respond(scope, send, 405, _JSON, b'{"error":"only GET and HEAD"}')
        else:
            await respond(scope, send, *await answer(scope))

    def _answers(self, scope: Scope) -> Callable[[Scope], Awaitable[tuple[int, str, bytes]]] | None:
        if scope["type"] != "http":
            return None
        routes = {"/health/live": _live, "/health/ready": self._ready, "/metrics": self._metrics}
        return routes.get(scope["path"])

    async def _ready(self, _scope: Scope) -> tuple[int, str, bytes]:
        reasons = self._health.reasons()
        body = {"ready": not reasons, "reasons": reasons}
        return (503 if reasons else 200), _JSON, json.dumps(body).encode()

    async def _metrics(self, scope: Scope) -> tuple[int, str, bytes]:
        """Collected on the loop, where what is counted changes, and written down in a thread: with thousands
        of versions that takes most of a second, and requests would wait for it."""
        accept = b",".join(value for name, value in scope["headers"] if name == b"accept").decode("latin-1")
        encode, content_type = choose_encoder(accept)
        collected = _Collected(list(self._registry.collect()))
        return 200, content_type, await asyncio.to_thread(encode, collected)


class _Collected(Collector):
    """What was collected, to be written down."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """The metrics as they were."""
        return self._metrics


def ops_app(health: Health, registry: CollectorRegistry, *, guest: bool = False) -> App:
    """An application that has the three paths and nothing else."""
    return OpsEndpoints(_nothing, health, registry, guest=guest)


async def _live(_scope: Scope) -> tuple[int, str, bytes]:
    return 200, _JSON, b'{"live":true}'


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await respond(scope, send, 404, _JSON, b'{"error":"only /health/live, /health/ready and /metrics"}')
    elif scope["type"] == "lifespan":
        while True:
            phase = (await receive())["type"]
            await send({"type": f"{phase}.complete"})
            if phase == "lifespan.shutdown":
                return
    else:
        await send({"type": "websocket.close", "code": 1000})


async def respond(scope: Scope, send: Send, status: int, content_type: str, body: bytes) -> None:
    """One whole answer."""
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(len(body)).encode()),
        (PROCESS_HEADER, str(os.getpid()).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
