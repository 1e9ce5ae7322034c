"""The internal credential on gRPC servers (grpcio)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from services.common.credential import accepts, bearer

_OPEN = ("/grpc.health.v1.Health/",)

if TYPE_CHECKING:
    # Generic in the stubs only; the classes themselves cannot be subscripted.
    Handler = grpc.RpcMethodHandler[Any, Any]
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    Interceptor = grpc.aio.ServerInterceptor


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    """What a client sends with every call."""
    return (("authorization", bearer(token)),)


class InternalAuthInterceptor(Interceptor):
    """Ends calls without the token with UNAUTHENTICATED. The health service stays open."""

    def __init__(self, token: str) -> None:
        if not token:
            raise ValueError("an empty internal token would let everybody in")
        self._token = token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        given = [value for name, value in handler_call_details.invocation_metadata if name == "authorization"]
        if handler_call_details.method.startswith(_OPEN) or (
            len(given) == 1 and accepts(given[0], self._token)
        ):
            return handler
        return _refusing(handler)


def _refusing(handler: Handler | None) -> Handler:
    """A handler of the same arity as `handler`: grpcio needs that to end the call in an orderly way."""

    async def unary(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid internal credential")

    async def stream(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid internal credential")
        yield  # makes this an async generator

    if handler is None or not (handler.request_streaming or handler.response_streaming):
        return grpc.unary_unary_rpc_method_handler(unary)
    if not handler.response_streaming:
        return grpc.stream_unary_rpc_method_handler(unary)
    if not handler.request_streaming:
        return grpc.unary_stream_rpc_method_handler(stream)
    return grpc.stream_stream_rpc_method_handler(stream)
