"""gRPC's health service, open to everybody.

Not grpcio's own: there all who watch a service wait for one condition. It is forgotten when the first of them
leaves, so that the others never hear of the end; and one who takes no message holds it for as long as he
likes, so that the others hear nothing and the server cannot end.
"""

# ruff: noqa: N802 - the names of the methods are the protocol's

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SERVING: Final = health_pb2.HealthCheckResponse(status="SERVING")
_NOT_SERVING: Final = health_pb2.HealthCheckResponse(status="NOT_SERVING")
_UNKNOWN: Final = health_pb2.HealthCheckResponse(status="SERVICE_UNKNOWN")


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # there are no stubs
    """The services `names` are well until the end is announced."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._ending = asyncio.Event()

    def announce_end(self) -> None:
        """Nothing is served any more, which those who watch are told."""
        self._ending.set()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return _NOT_SERVING if self._ending.is_set() else _SERVING

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        if request.service not in self._names:
            await context.write(_UNKNOWN)
        else:
            if not self._ending.is_set():
                await context.write(_SERVING)
                await self._ending.wait()
            await context.write(_NOT_SERVING)
        await asyncio.Event().wait()  # for as long as its client likes
