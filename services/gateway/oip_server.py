"""The Open Inference Protocol over gRPC, with health and reflection."""

# ruff: noqa: N802 - the names of the methods are the protocol's

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, Priority
from headrace.v1.tensor_pb2 import Code
from open_inference import open_inference_pb2 as oip_pb2
from open_inference import open_inference_pb2_grpc as oip_grpc
from opentelemetry.trace import SpanKind

from services.common.clock import Clock
from services.common.errors import Fatal, HeadraceError, Internal
from services.common.ids import id_text, new_id
from services.common.lifecycle import Health
from services.common.problems import HTTP_STATUS
from services.common.telemetry import Tracing, parse_traceparent, trace_bytes
from services.gateway.catalogue import Catalogue, ServedModel, ServedVersion
from services.gateway.codecs import oip
from services.gateway.keys import Key, KeyRing, Scope
from services.gateway.metrics import GatewayMetrics
from services.gateway.predict import PredictLimits
from services.gateway.rest.v2_routes import (
    EXTENSIONS,
    SERVER_NAME,
    model_metadata,
    repository_index,
    server_version,
)
from services.gateway.router_client import RouterClient, failure

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")

_ROUTE = "grpc_infer"
_SERVICE = "inference.GRPCInferenceService"
#: Protobuf around the tensors.
_MESSAGE_SLACK = 1 << 20

#: Calls at once; gRPC refuses those beyond with RESOURCE_EXHAUSTED.
_MAX_CALLS = 4096
_OPEN = frozenset({f"/{_SERVICE}/ServerLive", f"/{_SERVICE}/ServerReady"})
_CREDENTIALS = ("authorization", "x-api-key")

_HTTP_STATUS: dict[int, int] = {int(code): status for code, status in HTTP_STATUS.items()}
_STATUS: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}


class InferenceServicer(oip_grpc.GRPCInferenceServiceServicer):
    """The protocol's methods. Errors become gRPC statuses with the same number as their code."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        keys: KeyRing,
        router: RouterClient,
        health: Health,
        tracing: Tracing,
        metrics: GatewayMetrics,
        clock: Clock,
        limits: PredictLimits,
    ) -> None:
        self._catalogue = catalogue
        self.keys = keys
        self._router = router
        self._health = health
        self._tracing = tracing
        self._metrics = metrics
        self._clock = clock
        self._limits = limits

    async def ServerLive(self, request: oip_pb2.ServerLiveRequest, context: Context) -> Any:
        return oip_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip_pb2.ServerReadyRequest, context: Context) -> Any:
        return oip_pb2.ServerReadyResponse(ready=self._health.ready)

    async def ModelReady(self, request: oip_pb2.ModelReadyRequest, context: Context) -> Any:
        async def answer() -> oip_pb2.ModelReadyResponse:
            self._asked(context, request.name, request.version)
            return oip_pb2.ModelReadyResponse(ready=self._health.ready)

        return await self._answered(context, answer)

    async def ServerMetadata(self, request: oip_pb2.ServerMetadataRequest, context: Context) -> Any:
        async def answer() -> oip_pb2.ServerMetadataResponse:
            self._charge(self._caller(context, Scope.PREDICT, Scope.READ))
            return oip_pb2.ServerMetadataResponse(
                name=SERVER_NAME, version=server_version(), extensions=EXTENSIONS
            )

        return await self._answered(context, answer)

    async def ModelMetadata(self, request: oip_pb2.ModelMetadataRequest, context: Context) -> Any:
        async def answer() -> oip_pb2.ModelMetadataResponse:
            described = model_metadata(*self._asked(context, request.name, request.version))
            return oip_pb2.ModelMetadataResponse(**described)

        return await self._answered(context, answer)

    async def RepositoryIndex(self, request: oip_pb2.RepositoryIndexRequest, context: Context) -> Any:
        async def answer() -> oip_pb2.RepositoryIndexResponse:
            key = self._caller(context, Scope.PREDICT, Scope.READ)
            self._charge(key)
            return oip_pb2.RepositoryIndexResponse(models=repository_index(self._catalogue, key))

        return await self._answered(context, answer)

    async def ModelInfer(self, request: oip_pb2.ModelInferRequest, context: Context) -> Any:
        began = self._clock.monotonic()
        served: list[str] = []
        code: int = Code.CODE_CANCELLED
        try:
            answer = await self._answered(context, lambda: self._infer(request, context, served, began))
            code = Code.CODE_OK
        except grpc.aio.AbortError:
            code = _code(context)
            raise
        finally:
            took = self._clock.monotonic() - began
            # Under HTTP's numbers, so that one rule counts failures whatever brought them.
            status = 200 if code == Code.CODE_OK else _HTTP_STATUS.get(code, 500)
            self._metrics.observe(_ROUTE, served[0] if served else "", status, took)
        return answer

    async def _infer(
        self, asked: oip_pb2.ModelInferRequest, context: Context, served: list[str], began: float
    ) -> oip_pb2.ModelInferResponse:
        key = self._caller(context, Scope.PREDICT)
        self._router.admit()
        self._charge(key)
        model, version = self._found(key, asked.model_name, asked.model_version)
        served.append(model.name)
        request = PredictRequest(
            request_id=new_id(),
            received_at_us=self._clock.unix_us(),
            key_id=key.key_id,
            model=model.name,
            version=asked.model_version,
        )
        if asked.ByteSize() > self._limits.inline_bytes:
            await asyncio.to_thread(oip.fill_request, request, version.signature, asked)
        else:
            oip.fill_request(request, version.signature, asked)
        if request.priority == Priority.PRIORITY_LOW:
            self._router.admit_low()
        parent = parse_traceparent(_metadata(context, "traceparent"))
        trace, started = self._tracing.start(parent), time.time_ns()
        request.trace = trace_bytes(trace)
        left = context.time_remaining()
        # What the caller says, by its deadline or the protocol's parameter; else what the model is given.
        said = [one for one in (left, oip.timeout_of(asked) or None) if one is not None]
        timeout = min(said or [model.timeout_s or self._limits.default_timeout_s])
        timeout = min(timeout, self._limits.max_timeout_s)
        reply = await self._router.predict(request.SerializeToString(), began + timeout)
        if trace is not None:
            self._tracing.record_span(
                "ModelInfer",
                started,
                time.time_ns(),
                parent,
                attributes={"headrace.model": model.name, "headrace.request_id": id_text(request.request_id)},
                context=trace,
                kind=SpanKind.SERVER,
                error=None if reply.code == Code.CODE_OK else Code.Name(reply.code),
            )
        if reply.code != Code.CODE_OK:
            raise failure(reply)
        now = self._clock.monotonic()
        self._router.answered(reply, now - began, now)
        opened = PredictReply.FromString(reply.SerializeToString())
        return oip.to_response(asked, id_text(request.request_id), opened)

    async def _answered(self, context: Context, answer: Callable[[], Awaitable[Answer]]) -> Answer:
        try:
            return await answer()
        except HeadraceError as error:
            failure = error
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("grpc_crashed")
            failure = Internal("The gateway failed to handle this request.")
        message = failure.message
        if failure.field and failure.field not in message:
            message = f"{failure.field}: {message}"
        trailing: tuple[tuple[str, str], ...] = ()
        if failure.retry_after_ms:
            # What gRPC's own retry policy reads.
            trailing = (("grpc-retry-pushback-ms", str(failure.retry_after_ms)),)
        await context.abort(_STATUS[failure.code], message, trailing)
        raise AssertionError("abort raises")

    def _asked(self, context: Context, model: str, version: str) -> tuple[ServedModel, ServedVersion]:
        key = self._caller(context, Scope.PREDICT, Scope.READ)
        self._charge(key)
        return self._found(key, model, version)

    def _found(self, key: Key, model: str, version: str) -> tuple[ServedModel, ServedVersion]:
        key.require_model(model)
        served = self._catalogue.model(model)
        return served, served.version(version)

    def _caller(self, context: Context, *any_of: Scope) -> Key:
        authorization, api_key = _metadata(context, "authorization"), _metadata(context, "x-api-key")
        key = self.keys.authenticate(authorization, api_key)
        if not any(scope in key.scopes for scope in any_of):
            key.require(any_of[0])
        return key

    def _charge(self, key: Key) -> None:
        """Count one call against the key's limit. Raises ResourceExhausted."""
        if key.bucket is not None:
            key.bucket.admit(self._clock.monotonic())


class _Door(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Refuses callers without a key before their message is read: it may be as large as a body."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        method: str = details.method
        if handler is None or method in _OPEN or not method.startswith(f"/{_SERVICE}/"):
            return handler
        sent = {name: value for name, value in details.invocation_metadata or () if name in _CREDENTIALS}
        try:
            self._keys.authenticate(*(_bytes(sent.get(name)) for name in _CREDENTIALS))
        except HeadraceError as error:
            status, message = _STATUS[error.code], error.message

            async def refuse(_requests: Any, context: Context) -> None:
                await context.abort(status, message)

            # As a method that takes a stream: those are called before anything of it was read.
            return grpc.stream_unary_rpc_method_handler(refuse)
        return handler


@dataclass(frozen=True, slots=True)
class OipServer:
    """A running server and the port that it got."""

    port: int
    announce_end: Callable[[], Awaitable[None]]
    """Say by gRPC's own health service that the end is near; calls go on."""


@asynccontextmanager
async def serve_oip(
    servicer: InferenceServicer,
    host: str,
    port: int,
    *,
    max_body_bytes: int,
    drain_s: float,
    reuse_port: bool = False,
) -> AsyncIterator[OipServer]:
    """Serve while the block runs. At the end calls have `drain_s` seconds. Raises Fatal
    where the port is taken."""
    bound = max_body_bytes + _MESSAGE_SLACK
    server = grpc.aio.server(
        interceptors=[_Door(servicer.keys)],
        maximum_concurrent_rpcs=_MAX_CALLS,
        options=[
            ("grpc.max_receive_message_length", bound),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", int(reuse_port)),
        ],
    )
    oip_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    serving = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
    health_pb2_grpc.add_HealthServicer_to_server(serving, server)
    names = (_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    for name in ("", *names):
        await serving.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        chosen = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise Fatal(f"Cannot listen on {host}:{port} for gRPC: the port is taken.") from error
    await server.start()
    try:
        yield OipServer(chosen, serving.enter_graceful_shutdown)
    finally:
        await serving.enter_graceful_shutdown()
        await server.stop(drain_s)


def _code(context: Context) -> int:
    """The status that the call was aborted with; a number or a member of grpc's enumeration."""
    code: Any = context.code()
    return int(code.value[0] if isinstance(code, grpc.StatusCode) else code or 0)


def _metadata(context: Context, name: str) -> bytes | None:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return _bytes(value)
    return None


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode("latin-1", "replace") if isinstance(value, str) else value
