"""Unary `Predict`, health and reflection by grpcio, for callers that have one request at a time."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

import grpc
from headrace.v1 import dataplane_pb2, dataplane_pb2_grpc
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common import grpc_serving
from services.worker.item import Answer, Item
from services.worker.replies import error_reply
from services.worker.servicer import Servicer, Version

_SERVICE = dataplane_pb2.DESCRIPTOR.services_by_name["DataPlane"].full_name


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


def serve_grpc(
    servicer: Servicer,
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
        add_dataplane(UnaryDataPlane(servicer), server)  # type: ignore[no-untyped-call]  # generated

    return grpc_serving.serve_grpc(_SERVICE, add, (host, port), token, drain_s=drain_s, reuse_port=reuse_port)
