"""Records become observations, as many at once as look alike: what a delivery costs once, no row costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.v1.dataplane_pb2 import Origin
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Signature, Tensor

from services.common.bus.port import Malformed
from services.common.errors import InvalidArgument
from services.drift.observations import Observations, observe

_UNREADABLE = (InvalidArgument, ValueError, IndexError, KeyError)
Layout = tuple[bool, tuple[tuple[str, int, tuple[int, ...]], ...]]


@dataclass(frozen=True, slots=True)
class Numbered:
    """A record with its place in the delivery, by which it is named when it cannot be read."""

    index: int
    batch: PredictionBatch


def observe_all(items: Sequence[Numbered], signature: Signature) -> Iterator[tuple[Observations, int]]:
    """Observations of all `items` with the time of their last answer, one per run of records of one layout.

    Raises Malformed naming the first record that cannot be read.
    """
    for run in _runs(items):
        try:
            seen = observe(_joined([item.batch for item in run]), signature)
        except _UNREADABLE:
            _blame(run, signature)
            raise
        if any("\0" in name for name in (*seen.numeric, *seen.categorical)):
            raise Malformed(run[0].index, "a tensor's name holds a NUL")
        yield seen, run[-1].batch.answered_at_us


def _blame(run: Sequence[Numbered], signature: Signature) -> None:
    for item in run:
        try:
            observe(item.batch, signature)
        except _UNREADABLE as error:
            raise Malformed(item.index, str(error)) from error


def _runs(items: Sequence[Numbered]) -> Iterator[list[Numbered]]:
    run: list[Numbered] = []
    shared: Layout | None = None
    for item in items:
        layout = _layout(item.batch)
        if run and layout != shared:
            yield run
            run = []
        shared = layout
        run.append(item)
    if run:
        yield run


def _layout(batch: PredictionBatch) -> Layout:
    tensors = tuple((t.name, t.datatype, tuple(t.shape[1:])) for t in (*batch.inputs, *batch.outputs))
    return batch.exclude_from_drift, tensors


def _joined(batches: Sequence[PredictionBatch]) -> PredictionBatch:
    """One record that holds the rows of all, in order. Row-major tensors are joined by their bytes."""
    if len(batches) == 1:
        return batches[0]
    whole = PredictionBatch(exclude_from_drift=batches[0].exclude_from_drift)
    for batch in batches:
        count = len(batch.codes)
        if len(batch.rows) != count or len(batch.origins) not in (0, count):
            raise InvalidArgument("codes, rows and origins differ in length")
        whole.codes.extend(batch.codes)
        whole.rows.extend(batch.rows)
        whole.origins.extend(batch.origins or [Origin.ORIGIN_ONLINE] * count)
    first = batches[0]
    for place in range(len(first.inputs)):
        whole.inputs.append(_stacked([batch.inputs[place] for batch in batches]))
    for place in range(len(first.outputs)):
        whole.outputs.append(_stacked([batch.outputs[place] for batch in batches]))
    return whole


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    rows = sum(tensor.shape[0] if tensor.shape else 0 for tensor in tensors)
    data = b"".join([tensor.data for tensor in tensors])
    return Tensor(name=first.name, datatype=first.datatype, shape=[rows, *first.shape[1:]], data=data)
