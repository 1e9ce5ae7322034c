"""The credential that services of one installation show each other over HTTP. `grpc_auth.py` is its gRPC
side."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from services.common.credential import accepts, bearer
from services.common.errors import Unauthenticated
from services.common.problems import problem, problem_headers

__all__ = ["InternalAuth", "accepts", "bearer"]

_OPEN = ("/health/live", "/health/ready", "/metrics")


class InternalAuth:
    """ASGI middleware that answers 401 to whoever lacks the token. Health and metrics stay open."""

    def __init__(self, app: ASGIApp, token: str, open_paths: Iterable[str] = _OPEN) -> None:
        if not token:
            raise ValueError("an empty internal token would let everybody in")
        self._app = app
        self._token = token
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._open or self._authorized(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no valid internal credential"})
        else:
            error = Unauthenticated("This address is for services of this installation; use the gateway.")
            status, body = problem(error)
            headers = problem_headers(error)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _authorized(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and accepts(given[0], self._token)
