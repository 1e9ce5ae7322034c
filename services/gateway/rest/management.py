"""One door to the management APIs: a streaming reverse proxy with the caller checked here.

Bodies pass in pieces both ways, so an upload of any size costs one piece of memory. The upstream sees the
installation's credential and who asked, never the caller's key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from services.common.clock import Clock
from services.common.credential import bearer
from services.common.errors import DeadlineExceeded, NotFound, PermissionDenied, Unavailable
from services.common.telemetry import current_context, traceparent
from services.gateway.jobs.shares import Places
from services.gateway.keys import Key, KeyRing, Scope
from services.gateway.rest.door import authenticated

#: Where a path names a model, and those that take it from the query when they are read; `{}` is any one
#: segment. An experiment's or rollout's own path names no model: a key for some models asks with `?model=`.
_BY_PATH = (
    ("v1", "models", "{}"),
    ("v1", "deployments", "{}"),
    ("v1", "analytics", "models", "{}"),
    ("v1", "shadows", "{}"),
    ("v1", "drift", "models", "{}"),
)
_BY_QUERY = (
    ("v1", "analytics", "query"),
    ("v1", "analytics", "predictions", "{}"),
    ("v1", "drift", "alerts"),
    ("v1", "experiments"),
    ("v1", "experiments", "placebo"),
    ("v1", "rollouts"),
)
_READS = ("GET", "HEAD")
#: Questions about experiments and rollouts that analytics answers; the registry has all else of them.
_RESULTS = (
    "/v1/experiments/plan",
    "/v1/experiments/off-policy",
    "/v1/experiments/placebo",
    "/v1/experiments/{id}/results",
    "/v1/rollouts/{id}/results",
)

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
_RETRY_MS = 1000
#: Of which one key alone gets half.
_CONNECTIONS = 64

#: Of one connection only (RFC 9110, 7.6.1), or ours to set.
_NOT_PASSED_ON = frozenset(
    (
        b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
        b"transfer-encoding upgrade host authorization x-api-key x-request-id traceparent expect cookie "
        b"forwarded x-forwarded-for x-headrace-key-id x-headrace-scopes"
    ).split()
)
#: What curl and others say of a body where nobody has told them: all that stands behind takes JSON.
_UNTOLD = (b"content-type", b"application/x-www-form-urlencoded")
_NOT_PASSED_BACK = frozenset(
    b"connection keep-alive transfer-encoding date server x-request-id upgrade".split()
)


@dataclass(frozen=True, slots=True)
class Upstream:
    """One service behind the door. `writes` is the scope for everything but GET and HEAD. `paths` are its
    own though they stand below a prefix of another."""

    name: str
    prefixes: tuple[str, ...]
    base_url: str
    writes: Scope
    paths: tuple[str, ...] = ()


def upstreams(registry_url: str, analytics_url: str, drift_url: str) -> tuple[Upstream, ...]:
    """The services behind the door."""
    return (
        Upstream(
            "registry",
            ("/v1/models", "/v1/deployments", "/v1/keys", "/v1/experiments", "/v1/rollouts"),
            registry_url,
            Scope.ADMIN,
        ),
        Upstream("analytics", ("/v1/analytics", "/v1/shadows"), analytics_url, Scope.READ, _RESULTS),
        Upstream("drift", ("/v1/drift",), drift_url, Scope.ADMIN),
    )


def management_client(
    token: str, services: tuple[Upstream, ...], connect_s: float = 2.0, silence_s: float = 120.0
) -> httpx.AsyncClient:
    """The client that every upstream is asked with; at most 64 requests to each at once, so that slow queries
    to one (analytics) never keep others (the revocation of a key) waiting."""
    limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS // 4)
    return httpx.AsyncClient(
        headers={"authorization": bearer(token)},
        timeout=httpx.Timeout(silence_s, connect=connect_s, pool=connect_s),
        limits=limits,
        mounts={
            service.base_url: httpx.AsyncHTTPTransport(limits=limits, trust_env=False) for service in services
        },
        follow_redirects=False,
        trust_env=False,
    )


def management_routes(
    client: httpx.AsyncClient, services: tuple[Upstream, ...], keys: KeyRing, clock: Clock
) -> APIRouter:
    """Routes for every prefix; what stands under them is documented by the services themselves."""
    router = APIRouter(tags=["management"])
    places = {service.name: Places(_CONNECTIONS, f"requests to {service.name}") for service in services}
    for service in services:
        for path in service.paths:
            handler = _handler(client, service, places[service.name], keys, clock)
            router.add_api_route(path, handler, methods=_METHODS, include_in_schema=False)
    for service in services:
        for prefix in service.prefixes:
            handler = _handler(client, service, places[service.name], keys, clock)
            for method in ("GET", "POST"):
                router.add_api_route(
                    prefix,
                    handler,
                    methods=[method],
                    summary=f"Passed on to {service.name}",
                    operation_id=f"{method.lower()}{prefix.replace('/', '_')}",
                )
            for path in (prefix, prefix + "/{rest:path}"):
                router.add_api_route(path, handler, methods=_METHODS, include_in_schema=False)
    return router


def _handler(  # type: ignore[no-untyped-def]  # FastAPI reads the inner signature
    client: httpx.AsyncClient, service: Upstream, places: Places, keys: KeyRing, clock: Clock
):
    async def passed_on(request: Request) -> Response:
        reads = request.method in _READS
        caller = authenticated(request, keys, Scope.READ if reads else service.writes, clock.monotonic())
        asked = request.query_params.getlist("model") if reads else ()
        require_models(caller, request.scope["path"], asked)
        # Bodies and answers may take for ever: whoever sends or reads slowly leaves connections to others.
        with ExitStack() as place:
            place.enter_context(places.taken(caller.key_id))
            return await _forward(client, service, request, caller, place)

    return passed_on


def require_models(caller: Key, path: str, asked: Sequence[str]) -> None:
    """Raise PermissionDenied where the caller's key is for some models and what it asks for is not about one
    of these. `asked` are the query's models, which count only where the path takes its model from there."""
    if not caller.models:
        return
    segments = path.removeprefix("/").split("/")
    named = next((segments[len(form) - 1] for form in _BY_PATH if _starts(segments, form)), None)
    if named is None and any(len(segments) == len(form) and _starts(segments, form) for form in _BY_QUERY):
        for model in asked:
            caller.require_model(model)
        named = asked[0] if asked else None
    if named is None:
        raise PermissionDenied("This key is for some models only; ask about one of them.", field="model")
    caller.require_model(named)


def _starts(segments: Sequence[str], form: Sequence[str]) -> bool:
    return len(segments) >= len(form) and all(
        wanted in (found, "{}") for found, wanted in zip(segments, form, strict=False)
    )


async def _forward(
    client: httpx.AsyncClient, service: Upstream, request: Request, caller: Key, place: ExitStack
) -> Response:
    outgoing = client.build_request(
        request.method,
        _url(service, request),
        headers=_request_headers(request, caller),
        content=_body(request),
    )
    try:
        answer = await client.send(outgoing, stream=True)
    except httpx.TimeoutException as error:
        if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
            raise Unavailable(
                f"The {service.name} service is not there now.", retry_after_ms=_RETRY_MS
            ) from None
        raise DeadlineExceeded(f"The {service.name} service did not answer in time.") from None
    except ClientDisconnect:
        return Response(status_code=499)
    except httpx.TransportError:
        raise Unavailable(f"The {service.name} service is not there now.", retry_after_ms=_RETRY_MS) from None
    response = StreamingResponse(
        _pieces(answer, place.pop_all()), answer.status_code, background=BackgroundTask(answer.aclose)
    )
    response.raw_headers = [
        (name.lower(), value) for name, value in answer.headers.raw if name.lower() not in _NOT_PASSED_BACK
    ]
    return response


async def _pieces(answer: httpx.Response, place: ExitStack) -> AsyncIterator[bytes]:
    """What the service says. Its place is free again behind the last piece, and when this is forgotten."""
    with place:
        async for piece in answer.aiter_raw():
            yield piece


def _url(service: Upstream, request: Request) -> httpx.URL:
    path: bytes = request.scope["raw_path"].split(b"?")[0]
    # Dot segments, plain or escaped, would lead out of the prefix that the scope was checked for.
    # Not `request.url`, which is put together from a Host header of the caller's making.
    segments = request.scope["path"].split("/")
    if ".." in segments or "." in segments or b"%2f" in path.lower():
        raise NotFound(f"There is nothing at {request.scope['path']}.")
    query: bytes = request.scope["query_string"]
    return httpx.URL(service.base_url).copy_with(raw_path=path + (b"?" + query if query else b""))


def _request_headers(request: Request, caller: Key) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"content-type", b"application/json") if (name, value) == _UNTOLD else (name, value)
        for name, value in request.headers.raw
        if name not in _NOT_PASSED_ON
    ]
    headers += [
        (b"x-headrace-key-id", caller.key_id.encode()),
        (b"x-headrace-scopes", ",".join(sorted(caller.scopes)).encode()),
        (b"x-request-id", request.state.request_id.encode()),
    ]
    context = current_context()
    if context is not None:
        headers.append((b"traceparent", traceparent(context).encode()))
    return headers


def _body(request: Request) -> AsyncIterator[bytes] | None:
    headers: Mapping[str, str] = request.headers
    if "content-length" not in headers and "transfer-encoding" not in headers:
        return None
    return request.stream()
