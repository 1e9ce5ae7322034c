"""Unary `Predict`, health and reflection by grpcio, for callers that have one request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from headrace.v1 import dataplane_pb2, dataplane_pb2_grpc
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.errors import Fatal
from services.common.grpc_auth import InternalAuthInterceptor
from services.worker.item import Answer, Item
from services.worker.replies import error_reply
from services.worker.servicer import Servicer, Version

_SERVICE = dataplane_pb2.DESCRIPTOR.services_by_name["DataPlane"].full_name
_MAX_MESSAGE_BYTES = 64 << 20


class UnaryDataPlane(dataplane_pb2_grpc.DataPlaneServicer):
    """`Predict` answers with a reply that carries its code, as a frame's item would; the stream is served on
    an address of its own."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer

    async def Predict(  # noqa: N802 - the name in the contract
        self, request: PredictRequest, context: grpc.aio.ServicerContext[PredictRequest, PredictReply]
    ) -> PredictReply:
        """Raises nothing. The call's own deadline holds where the request carries none."""
        answered: asyncio.Future[PredictReply] = asyncio.get_running_loop().create_future()

        def settle(request: PredictRequest, answer: Answer) -> None:
            if answered.done():
                return
            if isinstance(answer, bytes):
                answered.set_result(PredictReply.FromString(answer))
            else:
                answered.set_result(error_reply(request, answer))

        remaining = context.time_remaining()
        if remaining is not None and not request.timeout_us:
            request.timeout_us = max(1, int(remaining * 1e6))
        waiting: dict[int, tuple[Version, Item]] = {}
        self._servicer.accept([request], settle, waiting, {})
        try:
            return await answered
        except asyncio.CancelledError:
            for loaded, item in waiting.values():
                loaded.cancel(item)
            raise


@asynccontextmanager
async def serve_grpc(
    servicer: Servicer,
    host: str,
    port: int,
    token: str,
    *,
    drain_s: float,
    reuse_port: bool = False,
) -> AsyncIterator[int]:
    """Serve while the block runs; gives the bound port. Raises Fatal where the port is taken."""
    server = grpc.aio.server(
        interceptors=[InternalAuthInterceptor(token)],
        options=[
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", int(reuse_port)),
        ],
    )
    add_dataplane = dataplane_pb2_grpc.add_DataPlaneServicer_to_server
    add_dataplane(UnaryDataPlane(servicer), server)  # type: ignore[no-untyped-call]  # generated
    healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs know only the sync one
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError as error:
        raise Fatal(f"port {port} of {host} is in use; set GRPC_PORT to another") from error
    await server.start()
    for service in ("", _SERVICE):
        await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield bound
    finally:
        await healthy.enter_graceful_shutdown()
        await server.stop(drain_s)
