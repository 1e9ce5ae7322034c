"""What every ordinary route shares: request ids, callers, bounded bodies, and errors in the shape of the
path."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.errors import BodyTooLarge, HeadraceError, InvalidArgument
from services.common.ids import id_text, new_id
from services.common.problems import install_problem_handlers, problem_headers
from services.gateway.errors import RequestTimeout, as_oip, as_openai, as_problem
from services.gateway.keys import Key, KeyRing
from services.gateway.keys import Scope as KeyScope
from services.gateway.predict import correlation_of
from services.gateway.reading import BodyBudget

#: For a whole body: who sends a byte now and then holds the memory of all others.
_BODY_S = 120.0
#: Routes that OpenAI's clients call.
_OPENAI = (
    "/v1/files",
    "/v1/batches",
    "/v1/embeddings",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
)

Handler = Callable[[Request, Exception], Awaitable[Response]]


class RequestIds:
    """ASGI middleware: every answer carries X-Request-Id; a caller's own comes back as X-Correlation-Id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        correlation = correlation_of(sent)
        request_id = id_text(new_id())
        scope.setdefault("state", {})["request_id"] = request_id

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                if not any(name.lower() == b"x-request-id" for name, _value in headers):
                    headers.append((b"x-request-id", request_id.encode()))
                    if correlation is not None:
                        headers.append((b"x-correlation-id", correlation))
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive, marked)


def authenticated(request: Request, keys: KeyRing, scope: KeyScope, now: float) -> Key:
    """The caller, allowed to do `scope` and within its rate. Raises Unauthenticated, PermissionDenied or
    ResourceExhausted."""
    key = keys.authenticate(_header(request, "authorization"), _header(request, "x-api-key"))
    key.require(scope)
    request.state.holder = key.holder
    if key.bucket is not None:
        key.bucket.admit(now)
    return key


async def bounded_body(request: Request, limit: int, budget: BodyBudget, within_s: float = _BODY_S) -> bytes:
    """The whole body. Raises BodyTooLarge beyond `limit` bytes, after reading (and dropping) as much again,
    so that most senders see the answer before the connection ends; Unavailable where `budget` is used up,
    ResourceExhausted where the caller has its share of it, RequestTimeout where it takes longer than
    `within_s`."""
    chunks: list[bytes] = []
    size = held = 0
    holder = getattr(request.state, "holder", budget.strangers)
    try:
        async with asyncio.timeout(within_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    budget.take(len(chunk), holder)
                    held += len(chunk)
                    chunks.append(chunk)
                else:
                    chunks.clear()
                    if size > 2 * limit:
                        break
    except TimeoutError:
        raise RequestTimeout("The body did not arrive in time.") from None
    finally:
        budget.give(held, holder)
    if size > limit:
        raise BodyTooLarge(f"The body is longer than {limit} bytes.")
    return b"".join(chunks)


def install_errors(app: FastAPI) -> None:
    """Problems everywhere; `{"error": …}` below /v2 and, in their own shape, on OpenAI's routes."""
    install_problem_handlers(app)
    for kind in (HeadraceError, HTTPException):
        usual: Handler = app.exception_handlers[kind]  # type: ignore[assignment]  # both are coroutines
        app.add_exception_handler(kind, _by_path(usual))
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


def _by_path(usual: Handler) -> Handler:
    async def handle(request: Request, error: Exception) -> Response:
        shape = _shape_of(request.url.path)
        if shape is None and isinstance(error, RequestTimeout):
            status, body = as_problem(error, request.state.request_id)
            return Response(body, status, {"content-type": "application/problem+json"})
        if shape is None:
            return await usual(request, error)
        if isinstance(error, HeadraceError):
            status, body = shape(error)
            headers = {name.decode(): value.decode() for name, value in problem_headers(error)}
            return Response(body, status, headers | {"content-type": "application/json"})
        answer = await usual(request, error)
        # Of a kind that is the caller's mistake: OpenAI's shape says whose it is.
        detail = InvalidArgument(getattr(error, "detail", "") or "The request failed.")
        if answer.status_code == 404:
            detail = InvalidArgument(f"There is nothing at {request.url.path}.")
        elif answer.status_code == 405:
            detail = InvalidArgument(f"{request.url.path} does not take {request.method}.")
        _status, body = shape(detail)
        return Response(body, answer.status_code, media_type="application/json")

    return handle


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    """The client left before its body was whole: nobody reads the answer, and nothing failed here."""
    return Response(status_code=499)


def _shape_of(path: str) -> Callable[[HeadraceError], tuple[int, bytes]] | None:
    """How errors look below `path`; None: as problems."""
    if path.startswith("/v2"):
        return as_oip
    return as_openai if path.startswith(_OPENAI) else None


def _header(request: Request, name: str) -> bytes | None:
    value = request.headers.get(name)
    return None if value is None else value.encode("latin-1")
