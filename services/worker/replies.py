"""Answers of a batch as messages for the caller."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.errors import HeadraceError
from services.worker.batch_queue import Item
from services.worker.execution import Part
from services.worker.prediction_log import Answered


def ok_replies(
    version: str, part: Part, times: Answered, *, batched: bool
) -> Iterator[tuple[Item, PredictReply]]:
    """Each member of `part` with the reply that holds its rows.

    One message is reused for all members with as many rows: it is whoever takes it who must be done with it,
    or copy it, before the next is asked for."""
    made: dict[int, PredictReply] = {}
    first = 0
    for item in part.items:
        rows = item.rows
        reply = made.get(rows)
        if reply is None:
            reply = made[rows] = PredictReply(version=version, compute_us=times.compute_us)
            for column in part.columns:
                shape = (rows, *column.shape) if batched else column.shape
                reply.outputs.add(name=column.name, datatype=column.datatype, shape=shape)
        request = item.request
        reply.id = request.id
        reply.variant = request.variant
        reply.queue_us = item.queue_us
        for output, column in zip(reply.outputs, part.columns, strict=True):
            output.data = column.rows(first, rows)
        yield item, reply
        first += rows


def error_reply(request: PredictRequest, error: HeadraceError) -> PredictReply:
    """What the caller of `request` is told about `error`."""
    return PredictReply(
        id=request.id,
        code=error.code,
        message=error.message,
        field=error.field or "",
        version=request.version,
        variant=request.variant,
        retry_after_ms=error.retry_after_ms or 0,
    )
