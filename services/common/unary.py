"""Unary `Predict`, health and reflection by grpcio, for callers that have one request at a time: what routers
and workers have in common of it."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractAsyncContextManager

import grpc
from headrace.v1 import dataplane_pb2, dataplane_pb2_grpc
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common import grpc_serving

_SERVICE = dataplane_pb2.DESCRIPTOR.services_by_name["DataPlane"].full_name


class UnaryDataPlane(dataplane_pb2_grpc.DataPlaneServicer):
    """`Predict` answers with a reply that carries its code, as a frame's item would; the stream is served on
    an address of its own."""

    @abstractmethod
    async def answer(self, request: PredictRequest) -> PredictReply:
        """The reply, whatever it is. Raises nothing; where it is cancelled, nobody waits any more."""

    async def Predict(  # noqa: N802 - the name in the contract
        self, request: PredictRequest, context: grpc.aio.ServicerContext[PredictRequest, PredictReply]
    ) -> PredictReply:
        """Raises nothing. The call's own deadline holds where the request carries none."""
        remaining = context.time_remaining()
        if remaining is not None and not request.timeout_us:
            request.timeout_us = max(1, int(remaining * 1e6))
        return await self.answer(request)


def serve_unary(
    servicer: UnaryDataPlane,
    host: str,
    port: int,
    token: str,
    *,
    drain_s: float,
    reuse_port: bool = False,
) -> AbstractAsyncContextManager[int]:
    """Serve while the block runs; gives the bound port. Raises Fatal where the port is taken."""

    def add(server: grpc.aio.Server) -> None:
        add_dataplane = dataplane_pb2_grpc.add_DataPlaneServicer_to_server
        add_dataplane(servicer, server)  # type: ignore[no-untyped-call]  # generated

    return grpc_serving.serve_grpc(_SERVICE, add, (host, port), token, drain_s=drain_s, reuse_port=reuse_port)
