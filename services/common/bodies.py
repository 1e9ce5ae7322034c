"""How long the body of a request may be. FastAPI reads it whole before anything is checked."""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BoundBodies:
    """ASGI middleware: a longer body is refused with 413, unless `passes` says of its request that it is
    received piece by piece, within bounds of its own."""

    def __init__(
        self, app: ASGIApp, max_bytes: int, passes: Callable[[Scope], bool] = lambda _: False
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._passes = passes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._passes(scope):
            await self._app(scope, receive, send)
            return
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                # No error of ours: FastAPI would tell it as one of parsing.
                raise HTTPException(413, f"The body is longer than {self._max_bytes} bytes.")
            return message

        await self._app(scope, bounded, send)
