"""Unary `Predict`, for callers that have one request at a time."""

from __future__ import annotations

import asyncio

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.clock import Clock
from services.common.ids import new_id
from services.common.unary import UnaryDataPlane
from services.router.call import Call
from services.router.dispatch import Dispatcher


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


class RoutedUnary(UnaryDataPlane):
    """Routes what it is asked as it does what comes in frames."""

    def __init__(self, dispatcher: Dispatcher, clock: Clock) -> None:
        self._dispatcher = dispatcher
        self._clock = clock

    async def answer(self, request: PredictRequest) -> PredictReply:
        """Part of UnaryDataPlane."""
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
