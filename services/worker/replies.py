"""Answers of a batch, serialised: what all its members are told alike is written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.errors import HeadraceError
from services.worker.execution import Part
from services.worker.record_columns import Answered
from services.worker.tensors import Buffer, OutputColumn
from services.worker.wire import Kept, delimited, tag, tensor_head, varint

_ID: Final = tag(PredictReply.ID_FIELD_NUMBER, 0)
_OUTPUTS: Final = tag(PredictReply.OUTPUTS_FIELD_NUMBER, 2)
_QUEUE_US: Final = tag(PredictReply.QUEUE_US_FIELD_NUMBER, 0)
_COMPUTE_US: Final = tag(PredictReply.COMPUTE_US_FIELD_NUMBER, 0)
_MOST_KEPT: Final = 1024


class Replies:
    """Serialises the answers of one version. What is the same for requests of one size is kept."""

    def __init__(self, version: str, *, batched: bool) -> None:
        self._version = delimited(PredictReply.VERSION_FIELD_NUMBER, version.encode())
        self._batched = batched
        self._variants: Kept[tuple[str, str], bytes] = Kept(_MOST_KEPT)
        self._heads: Kept[tuple[object, ...], list[bytes | None]] = Kept(_MOST_KEPT)

    def of_part(self, part: Part, times: Answered, named: tuple[str, str] | None = None) -> list[bytes]:
        """A PredictReply for each member of `part`, with its rows. `named`: variant and experiment of all of
        them, where the caller knows."""
        columns = part.columns
        compute = _COMPUTE_US + varint(times.compute_us)
        replies = []
        first = 0
        # What the member before had, since most have the same.
        rows, queue_us, begin = -1, -1, b""
        variant, experiment = ("", "") if named is None else named
        heads: list[bytes | None] = []
        for item in part.items:
            if item.rows != rows:
                rows = item.rows
                heads = self._heads_of(columns, rows)
            if named is None:
                request = item.request
                if request.variant != variant or request.experiment != experiment:
                    queue_us, variant, experiment = -1, request.variant, request.experiment
            if item.queue_us != queue_us:
                queue_us = item.queue_us
                begin = self._named(variant, experiment) + varint(queue_us) + compute
            pieces: list[Buffer] = [_ID, varint(item.id), begin]
            for position in range(len(columns)):
                column, head = columns[position], heads[position]
                data = column.rows(first, rows)
                pieces.append(self._head(column, rows, len(data)) if head is None else head)
                pieces.append(data)
            replies.append(b"".join(pieces))
            first += rows
        return replies

    def _named(self, variant: str, experiment: str) -> bytes:
        named = self._variants.get((variant, experiment))
        if named is None:
            given = PredictReply(variant=variant, experiment=experiment).SerializeToString()
            named = self._variants[variant, experiment] = self._version + given + _QUEUE_US
        return named

    def _heads_of(self, columns: Sequence[OutputColumn], rows: int) -> list[bytes | None]:
        """What precedes the data of each output; None where that depends on the data."""
        layout: tuple[object, ...]
        if len(columns) == 1:
            layout = rows, columns[0].shape, columns[0].name
        else:
            layout = (rows, *[column.shape for column in columns], *[column.name for column in columns])
        heads = self._heads.get(layout)
        if heads is None:
            heads = self._heads[layout] = [
                self._head(column, rows, rows * column.stride) if column.starts is None else None
                for column in columns
            ]
        return heads

    def _head(self, column: OutputColumn, rows: int, nbytes: int) -> bytes:
        shape = (rows, *column.shape) if self._batched else column.shape
        return tensor_head(_OUTPUTS, column.name.encode(), column.datatype, shape, nbytes)


def error_reply(request: PredictRequest, error: HeadraceError, compute_us: int = 0) -> PredictReply:
    """What the caller of `request` is told about `error`; `compute_us`: that it ran and is in the log."""
    return PredictReply(
        id=request.id,
        code=error.code,
        message=error.message,
        field=error.field or "",
        version=request.version,
        variant=request.variant,
        experiment=request.experiment,
        compute_us=compute_us,
        retry_after_ms=error.retry_after_ms or 0,
    )
