"""Unary `Predict`, for callers that have one request at a time."""

from __future__ import annotations

import asyncio

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.unary import UnaryDataPlane
from services.worker.item import Answer, Item
from services.worker.replies import error_reply
from services.worker.servicer import Servicer, Version


class BatchedUnary(UnaryDataPlane):
    """Queues what it is asked as it does what comes in frames."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer

    async def answer(self, request: PredictRequest) -> PredictReply:
        """Part of UnaryDataPlane."""
        answered: asyncio.Future[PredictReply] = asyncio.get_running_loop().create_future()

        def settle(request: PredictRequest, answer: Answer) -> None:
            if answered.done():
                return
            if isinstance(answer, bytes):
                answered.set_result(PredictReply.FromString(answer))
            else:
                answered.set_result(error_reply(request, answer))

        waiting: dict[int, tuple[Version, Item]] = {}
        self._servicer.accept([request], settle, waiting, {})
        try:
            return await answered
        except asyncio.CancelledError:
            for loaded, item in waiting.values():
                loaded.cancel(item)
            raise
