"""Unary `Predict`, health and reflection by grpcio, for callers that have one request at a time."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

import grpc
from headrace.v1 import dataplane_pb2, dataplane_pb2_grpc
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common import grpc_serving
from services.common.clock import Clock
from services.common.ids import new_id
from services.router.call import Call
from services.router.dispatch import Dispatcher

_SERVICE = dataplane_pb2.DESCRIPTOR.services_by_name["DataPlane"].full_name


class _Waiter:
    """Owner of the one call of a unary request."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[PredictReply] = asyncio.get_running_loop().create_future()

    def answer(self, call: Call, reply: PredictReply) -> None:
        """Part of Owner."""
        if not self.reply.done():
            self.reply.set_result(reply)

    def pass_on(self, call: Call, reply: bytes) -> None:
        """Part of Owner."""
        answer = PredictReply.FromString(reply)
        answer.id = call.owner_id
        self.answer(call, answer)


class UnaryDataPlane(dataplane_pb2_grpc.DataPlaneServicer):
    """`Predict` answers with a reply that carries its code, as a frame's item would; the stream is served on
    an address of its own."""

    def __init__(self, dispatcher: Dispatcher, clock: Clock) -> None:
        self._dispatcher = dispatcher
        self._clock = clock

    async def Predict(  # noqa: N802 - the name in the contract
        self, request: PredictRequest, context: grpc.aio.ServicerContext[PredictRequest, PredictReply]
    ) -> PredictReply:
        """Raises nothing. The call's own deadline holds where the request carries none."""
        remaining = context.time_remaining()
        if remaining is not None and not request.timeout_us:
            request.timeout_us = max(1, int(remaining * 1e6))
        if len(request.request_id) != 16:
            request.request_id = new_id()
        if not request.received_at_us:
            request.received_at_us = self._clock.unix_us()
        waiter = _Waiter()
        payload = request.SerializeToString()
        call = Call(self._dispatcher, request, payload, waiter, self._clock.monotonic())
        call.begin()
        try:
            return await waiter.reply
        except asyncio.CancelledError:
            call.cancel()
            raise


def serve_grpc(
    dispatcher: Dispatcher,
    clock: Clock,
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
        add_dataplane(UnaryDataPlane(dispatcher, clock), server)  # type: ignore[no-untyped-call]  # generated

    return grpc_serving.serve_grpc(_SERVICE, add, (host, port), token, drain_s=drain_s, reuse_port=reuse_port)
