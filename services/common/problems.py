"""How errors look over HTTP: RFC 9457 problems everywhere, `{"error": …}` on Open Inference Protocol
routes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from headrace.v1.tensor_pb2 import Code
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.errors import BodyTooLarge, HeadraceError, Internal, InvalidArgument, MalformedBody

log = structlog.get_logger(__name__)

HTTP_STATUS: dict[Code, int] = {
    Code.CODE_OK: 200,
    Code.CODE_CANCELLED: 499,
    Code.CODE_UNKNOWN: 500,
    Code.CODE_INVALID_ARGUMENT: 422,
    Code.CODE_DEADLINE_EXCEEDED: 504,
    Code.CODE_NOT_FOUND: 404,
    Code.CODE_ALREADY_EXISTS: 409,
    Code.CODE_PERMISSION_DENIED: 403,
    Code.CODE_RESOURCE_EXHAUSTED: 429,
    Code.CODE_FAILED_PRECONDITION: 409,
    Code.CODE_ABORTED: 409,
    Code.CODE_OUT_OF_RANGE: 422,
    Code.CODE_UNIMPLEMENTED: 501,
    Code.CODE_INTERNAL: 500,
    Code.CODE_UNAVAILABLE: 503,
    Code.CODE_DATA_LOSS: 500,
    Code.CODE_UNAUTHENTICATED: 401,
}

#: What Open Inference Protocol clients know from Triton, and what they cannot do without beside it.
OIP_STATUS: dict[Code, int] = HTTP_STATUS | {
    Code.CODE_INVALID_ARGUMENT: 400,
    Code.CODE_OUT_OF_RANGE: 400,
    Code.CODE_FAILED_PRECONDITION: 400,
    Code.CODE_ALREADY_EXISTS: 400,
    Code.CODE_ABORTED: 400,
    Code.CODE_CANCELLED: 503,
}

#: Codes that the HTTP layer itself gives reasons for, by status.
_CODE_OF_STATUS = {
    400: Code.CODE_INVALID_ARGUMENT,
    401: Code.CODE_UNAUTHENTICATED,
    403: Code.CODE_PERMISSION_DENIED,
    404: Code.CODE_NOT_FOUND,
    405: Code.CODE_UNIMPLEMENTED,
    409: Code.CODE_ABORTED,
    413: Code.CODE_INVALID_ARGUMENT,
    415: Code.CODE_INVALID_ARGUMENT,
    422: Code.CODE_INVALID_ARGUMENT,
    429: Code.CODE_RESOURCE_EXHAUSTED,
    503: Code.CODE_UNAVAILABLE,
    504: Code.CODE_DEADLINE_EXCEEDED,
}
_MAX_LISTED = 10


def http_status(error: HeadraceError) -> int:
    """The HTTP status of `error` outside Open Inference Protocol routes."""
    if isinstance(error, MalformedBody):
        return 400
    if isinstance(error, BodyTooLarge):
        return 413
    return HTTP_STATUS.get(error.code, 500)


def problem(error: HeadraceError, request_id: str | None = None) -> tuple[int, bytes]:
    """Status and `application/problem+json` body of `error`."""
    status = http_status(error)
    return status, _body(status, error.code, error.message, error.field, request_id)


def oip_problem(error: HeadraceError) -> tuple[int, bytes]:
    """Status and body of `error` as the Open Inference Protocol has it; the field is named in the
    sentence."""
    status = 413 if isinstance(error, BodyTooLarge) else OIP_STATUS.get(error.code, 500)
    message = error.message
    if error.field and error.field not in message:
        message = f"{error.field}: {message}"
    return status, json.dumps({"error": message}, ensure_ascii=False).encode()


def problem_headers(error: HeadraceError) -> list[tuple[bytes, bytes]]:
    """Headers that go with `problem(error)`, Retry-After (whole seconds) where trying again can help."""
    headers = [(b"content-type", b"application/problem+json")]
    if error.retry_after_ms:
        headers.append((b"retry-after", str(-(-error.retry_after_ms // 1000)).encode()))
    if error.code == Code.CODE_UNAUTHENTICATED:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def field_path(location: Sequence[str | int]) -> str:
    """`("body", "weights", 1, "weight")` as `weights[1].weight`: named as its sender wrote it. What is wrong
    with the body as a whole is `body`."""
    parts = location[1:] if len(location) > 1 and location[0] in {"body", "path", "query"} else location
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def install_problem_handlers(app: FastAPI) -> None:
    """Give every error of `app` the problem shape: ours, the router's 404 and 405, validation errors with
    their field, and unknown exceptions as a 500 that says nothing and is logged. Where a middleware sets
    `request.state.request_id`, problems carry it."""
    app.add_exception_handler(HeadraceError, _on_headrace_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_middleware(_UnknownErrors)


def _body(
    status: int,
    code: Code,
    detail: str,
    field: str | None,
    request_id: str | None,
    errors: list[dict[str, str]] | None = None,
) -> bytes:
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": _title(status),
        "status": status,
        "detail": detail,
        "code": Code.Name(code).removeprefix("CODE_"),
    }
    if field:
        body["field"] = field
    if request_id:
        body["request_id"] = request_id
    if errors:
        body["errors"] = errors
    return json.dumps(body, ensure_ascii=False).encode()


def _title(status: int) -> str:
    if status == 499:
        return "Client Closed Request"
    return HTTPStatus(status).phrase


def _request_id(request: Request) -> str | None:
    return getattr(request.state, "request_id", None)


def _response(error: HeadraceError, request: Request) -> Response:
    status, body = problem(error, _request_id(request))
    headers = {name.decode(): value.decode() for name, value in problem_headers(error)}
    return Response(body, status, headers)


async def _on_headrace_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HeadraceError)  # noqa: S101 - registered for this class only
    if http_status(error) >= 500:
        log.warning("request_failed", path=request.url.path, code=Code.Name(error.code), detail=error.message)
    return _response(error, request)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
    detail = str(error.detail)
    if error.status_code == 404 and detail == "Not Found":
        detail = f"There is nothing at {request.url.path}."
    elif error.status_code == 405:
        detail = f"{request.url.path} does not take {request.method}."
    elif error.status_code == 400 and "parsing the body" in detail:
        return _response(MalformedBody("The body cannot be parsed."), request)
    code = _CODE_OF_STATUS.get(error.status_code, Code.CODE_INTERNAL)
    body = _body(error.status_code, code, detail, None, _request_id(request))
    headers = dict(error.headers or {}) | {"content-type": "application/problem+json"}
    return Response(body, error.status_code, headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class only
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        reason = next(item["ctx"].get("error", "") for item in found if item["type"] == "json_invalid")
        return _response(MalformedBody(f"The body is not JSON: {reason}."), request)
    listed = [{"field": field_path(item["loc"]), "detail": item["msg"]} for item in found[:_MAX_LISTED]]
    first = InvalidArgument(listed[0]["detail"], field=listed[0]["field"])
    body = _body(422, first.code, first.message, first.field, _request_id(request), listed)
    return Response(body, 422, {"content-type": "application/problem+json"})


class _UnknownErrors:
    """Innermost: an exception nobody foresaw becomes a logged 500, and never reaches the server's own log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            log.exception("request_crashed", path=scope["path"], method=scope["method"])
            if started:
                raise  # the answer is half sent; only cutting the connection tells its reader so
            request_id = scope.get("state", {}).get("request_id")
            error = Internal("The service failed to handle this request.")
            status, body = problem(error, request_id)
            headers = problem_headers(error)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
