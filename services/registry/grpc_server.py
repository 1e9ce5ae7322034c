"""grpc.aio around the servicer: credential, statuses of domain errors, health, reflection, graceful end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from headrace.v1 import registry_pb2, registry_pb2_grpc
from headrace.v1.tensor_pb2 import Code

from services.common.errors import Fatal, HeadraceError
from services.common.grpc_auth import Interceptor, InternalAuthInterceptor
from services.registry.metrics import Metrics
from services.registry.servicer import RegistryServicer

if TYPE_CHECKING:
    from services.common.grpc_auth import Handler

log = structlog.get_logger(__name__)

SERVICE = registry_pb2.DESCRIPTOR.services_by_name["Registry"].full_name
_STATUS = {status.value[0]: status for status in grpc.StatusCode}
_MAX_MESSAGE = 8 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),
]


class DomainErrors(Interceptor):
    """Gives each domain error its status, the field in the trailing metadata `headrace-field`; anything else
    is INTERNAL without details, and logged."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(f"/{SERVICE}/") or handler.response_streaming:
            return handler
        inner: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary
        name = method.rpartition("/")[2]

        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            code = Code.CODE_OK
            try:
                return await inner(request, context)
            except HeadraceError as error:
                code = error.code
                trailing = (("headrace-field", error.field),) if error.field else ()
                await context.abort(_STATUS[int(code)], error.message, trailing)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                code = Code.CODE_CANCELLED
                raise
            except Exception:
                code = Code.CODE_INTERNAL
                log.exception("rpc_crashed", method=name)
                await context.abort(grpc.StatusCode.INTERNAL, "The service failed to handle this request.")
            finally:
                self._metrics.rpcs.labels(name, Code.Name(code).removeprefix("CODE_")).inc()

        make: Any = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        made: Handler = make(answer, handler.request_deserializer, handler.response_serializer)
        return made


@asynccontextmanager
async def serve_grpc(
    servicer: RegistryServicer, host: str, port: int, *, token: str, metrics: Metrics, drain_s: float
) -> AsyncIterator[int]:
    """Serve while the block runs; gives the bound port (`port` 0: any free one). Raises Fatal where taken."""
    server = grpc.aio.server(
        interceptors=[InternalAuthInterceptor(token), DomainErrors(metrics)], options=_OPTIONS
    )
    registry_pb2_grpc.add_RegistryServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]  # generated
    states = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise Fatal(f"Cannot listen on {host}:{port} for gRPC.") from error
    await server.start()
    for name in ("", SERVICE):
        await states.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield bound
    finally:
        await states.enter_graceful_shutdown()
        await server.stop(drain_s)
