"""Errors of the HTTP layer itself, and how errors look in the two shapes that the gateway speaks."""

from __future__ import annotations

from http import HTTPStatus

import orjson
from headrace.v1.tensor_pb2 import Code

from services.common.errors import DeadlineExceeded, HeadraceError, InvalidArgument
from services.common.problems import oip_problem, problem


class HeadTooLarge(InvalidArgument):
    """The request's line and headers are longer than is accepted; nothing of it was looked at."""


class RequestTimeout(DeadlineExceeded):
    """The request did not arrive in time."""


#: HTTP has statuses of its own for these.
_STATUS: dict[type[HeadraceError], int] = {HeadTooLarge: 431, RequestTimeout: 408}


def as_problem(error: HeadraceError, request_id: str) -> tuple[int, bytes]:
    """Status and `application/problem+json` body."""
    status = _STATUS.get(type(error))
    if status is None:
        return problem(error, request_id)
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": error.message,
        "code": Code.Name(error.code).removeprefix("CODE_"),
        "request_id": request_id,
    }
    return status, orjson.dumps(body)


def as_oip(error: HeadraceError) -> tuple[int, bytes]:
    """Status and `{"error": …}` body."""
    status, body = oip_problem(error)
    return _STATUS.get(type(error), status), body


def as_openai(error: HeadraceError) -> tuple[int, bytes]:
    """Status and `{"error": {"message", "type", "param", "code"}}` body, as OpenAI's clients read it."""
    status, _body = problem(error)
    status = _STATUS.get(type(error), 400 if status == 422 else status)
    return status, orjson.dumps({"error": openai_error(error, status)})


def openai_error(error: HeadraceError, status: int) -> dict[str, str | None]:
    """What stands under `error`. Types and codes are OpenAI's where it has one for the case."""
    kind, code = "invalid_request_error", None
    if status == 401:
        code = "invalid_api_key"
    elif status == 404 and error.field == "model":
        code = "model_not_found"
    elif status == 429:
        kind, code = "rate_limit_error", "rate_limit_exceeded"
    elif status >= 500:
        kind, code = "server_error", Code.Name(error.code).removeprefix("CODE_").lower()
    return {"message": error.message, "type": kind, "param": error.field, "code": code}
