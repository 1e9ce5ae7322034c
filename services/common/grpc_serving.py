"""A grpcio server as every service has it: credential, health, reflection, an end that lets calls finish."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.errors import Fatal
from services.common.grpc_auth import Interceptor, InternalAuthInterceptor
from services.common.grpc_health import HealthServicer

_MAX_MESSAGE_BYTES = 64 << 20


@asynccontextmanager
async def serve_grpc(
    service: str,
    add: Callable[[grpc.aio.Server], None],
    address: tuple[str, int],
    token: str,
    *,
    drain_s: float,
    reuse_port: bool = False,
    max_request_bytes: int = _MAX_MESSAGE_BYTES,
    interceptors: Sequence[Interceptor] = (),
) -> AsyncIterator[int]:
    """Serve while the block runs; gives the bound port (0 in `address`: any free one). `add` registers the
    servicer of `service` (its full name); `interceptors` come behind the credential's. Raises Fatal where the
    port is taken."""
    host, port = address
    server = grpc.aio.server(
        interceptors=[InternalAuthInterceptor(token), *interceptors],
        options=[
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", int(reuse_port)),
        ],
    )
    add(server)
    healthy = HealthServicer(("", service))
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError as error:
        raise Fatal(f"port {port} of {host} is in use; set GRPC_PORT to another") from error
    await server.start()
    try:
        yield bound
    finally:
        healthy.announce_end()
        await server.stop(drain_s)
