"""One request and what its answer means: which error, and whether to try again. No I/O here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from headrace_client.errors import BY_STATUS, ConnectionFailed, DeadlineExceeded, HeadraceError
from headrace_client.results import Json

T = TypeVar("T")

FIRST_RECONNECT_S = 0.1


@dataclass(frozen=True, slots=True)
class Exchange(Generic[T]):
    """A call: what is sent and how the answer is read. `content` is asked anew for every attempt."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | Callable[[], Iterator[bytes]] | None = None


def with_json(method: str, path: str, body: Any, read: Callable[[httpx.Response], T]) -> Exchange[T]:
    """An exchange whose body is JSON. NaN and infinities are refused here: JSON has none."""
    content = json.dumps(body, allow_nan=False, separators=(",", ":"), default=_plain).encode()
    return Exchange(method, path, read, headers={"content-type": "application/json"}, content=content)


def segment(text: str) -> str:
    """`text` as one segment of a path."""
    return quote(text, safe="")


def json_of(answer: httpx.Response) -> Json:
    """The object that an answer is."""
    body: Json = answer.json()
    return body


def _plain(value: object) -> Any:
    """numpy arrays and scalars as what JSON has."""
    convert = getattr(value, "tolist", None)
    if convert is None:
        frame = ": its to_numpy() can, or its to_dict('records')" if hasattr(value, "to_numpy") else ""
        raise TypeError(f"{type(value).__name__} cannot be sent as JSON{frame}")
    return convert()


def error_of(response: httpx.Response) -> HeadraceError:
    """The error that a response of 4xx or 5xx carries, in whichever shape it comes."""
    try:
        body = response.json()
    except ValueError:
        body = None
    said = body if isinstance(body, dict) else {}
    if isinstance(said.get("error"), dict):  # OpenAI's shape
        inner = said["error"]
        said = {"detail": inner.get("message"), "code": inner.get("code"), "field": inner.get("param")}
    message = said.get("detail") or said.get("error") or said.get("title")
    return BY_STATUS.get(response.status_code, HeadraceError)(
        str(message or f"The server answered {response.status_code}."),
        status=response.status_code,
        code=said.get("code"),
        field=said.get("field"),
        request_id=said.get("request_id") or response.headers.get("x-request-id"),
        retry_after=retry_after(response),
    )


def retry_after(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header; None where there is none or it is a date."""
    text: str = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else None


def with_scheme(url: str) -> str:
    """`host:port` means http."""
    return url if "://" in url else f"http://{url}"


def transport_error(error: httpx.TransportError, base_url: str) -> HeadraceError:
    """The error of a request that got no answer."""
    if isinstance(error, httpx.TimeoutException):
        return DeadlineExceeded(f"{base_url} gave no answer in time.", code="DEADLINE_EXCEEDED")
    return ConnectionFailed(
        f"{base_url} cannot be reached ({error or type(error).__name__}).", code="UNAVAILABLE"
    )


def pause_before_retry(
    failure: httpx.Response | httpx.TransportError, attempt: int, remaining: float
) -> float | None:
    """Seconds to wait before the next attempt, None for no further one.

    Only what was certainly not carried out is sent again: no connection came about, or the server refused
    with 429 or 503 and said when to come back. `attempt` counts from 1, `remaining` is the time left.
    """
    if isinstance(failure, httpx.Response):
        wait = retry_after(failure) if failure.status_code in {429, 503} else None
    elif isinstance(failure, httpx.ConnectError | httpx.PoolTimeout):
        wait = FIRST_RECONNECT_S * 2.0 ** (attempt - 1)
    else:
        wait = None
    return wait if wait is not None and wait < remaining else None
