"""grpc.aio around the servicer, and the statuses of domain errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import grpc
import structlog
from headrace.v1 import registry_pb2, registry_pb2_grpc
from headrace.v1.tensor_pb2 import Code

from services.common import grpc_serving
from services.common.errors import HeadraceError
from services.common.grpc_auth import Interceptor
from services.registry.metrics import Metrics
from services.registry.servicer import RegistryServicer

if TYPE_CHECKING:
    from services.common.grpc_auth import Handler

log = structlog.get_logger(__name__)

SERVICE = registry_pb2.DESCRIPTOR.services_by_name["Registry"].full_name
_STATUS = {status.value[0]: status for status in grpc.StatusCode}
_MAX_REQUEST_BYTES = 8 << 20
#: What metadata take as it is; a field may hold a name that its sender chose. As gRPC writes its messages.
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class DomainErrors(Interceptor):
    """Gives each domain error its status, the field in the trailing metadata `headrace-field`, escaped as in
    addresses where it is not ASCII; anything else is INTERNAL without details, and logged."""

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
                trailing = (("headrace-field", quote(error.field, _PLAIN)),) if error.field else ()
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


def serve_grpc(
    servicer: RegistryServicer, host: str, port: int, *, token: str, metrics: Metrics, drain_s: float
) -> AbstractAsyncContextManager[int]:
    """Serve while the block runs; gives the bound port (`port` 0: any free one). Raises Fatal where taken."""

    def add(server: grpc.aio.Server) -> None:
        registry_pb2_grpc.add_RegistryServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]  # generated

    return grpc_serving.serve_grpc(
        SERVICE,
        add,
        (host, port),
        token,
        drain_s=drain_s,
        max_request_bytes=_MAX_REQUEST_BYTES,
        interceptors=[DomainErrors(metrics)],
    )
