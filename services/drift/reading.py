"""Records become rows that can be taken, as many at once as look alike: what a delivery costs once, no row
costs, and a row that nobody takes is never read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from headrace.v1.dataplane_pb2 import Origin
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, Signature, Tensor
from numpy.typing import NDArray

from services.common.bus.port import Malformed
from services.common.errors import InvalidArgument
from services.common.tensors import NUMPY_TYPES, encode_bytes, to_array
from services.drift.draw import Places, Priorities
from services.drift.observations import WATCHED, Observations, answer_output, observe

_UNREADABLE = (InvalidArgument, ValueError, IndexError, KeyError)
Layout = tuple[bool, tuple[tuple[str, int, tuple[int, ...]], ...]]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Numbered:
    """A record with its place in the delivery, by which it is named when it cannot be read."""

    index: int
    batch: PredictionBatch


class Run:
    """The watched rows of neighbouring records of one layout (`draw.Seen`): those that were answered, of
    users and of batch jobs. A record without payloads has none.

    Raises Malformed naming the first record whose columns do not fit its tensors; one whose tensors cannot be
    read is found when rows of it are taken.
    """

    def __init__(self, items: Sequence[Numbered], signature: Signature) -> None:
        self._items = items
        self._signature = signature
        first = items[0].batch
        outputs = {answer_output(signature), signature.probability_output} - {""}
        self._inputs = range(len(first.inputs))
        self._outputs = [place for place, tensor in enumerate(first.outputs) if tensor.name in outputs]
        self.at_us: int = items[-1].batch.answered_at_us
        watchable = signature.batched and not first.exclude_from_drift
        # Where each watched row lies among the rows of all tensors, end to end, and where each record does.
        self._places, self._starts = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
        if watchable and (len(first.inputs) or len(first.outputs)):
            self._places, self._starts = self._watched()
        self._priorities: Priorities | None = None

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self._places)

    def priorities(self) -> Priorities:
        """By the record's id and the row's place in it."""
        if self._priorities is None:
            halves = np.frombuffer(b"".join([item.batch.batch_id for item in self._items]), ">u8")
            high, low = halves.astype(np.uint64).reshape(-1, 2).T
            keys = _mixed(high ^ _mixed(low))
            record = np.searchsorted(self._starts, self._places, side="right") - 1
            local = (self._places - self._starts[record]).astype(np.uint64)
            self._priorities = _mixed(keys[record] + (local + np.uint64(1)) * _GOLDEN)
        return self._priorities

    def take(self, places: Places) -> Observations:
        """The rows at these places, which ascend. Raises Malformed naming a record that cannot be read."""
        wanted = self._places[places]
        bounds = np.searchsorted(wanted, self._starts)
        parts = PredictionBatch(codes=[Code.CODE_OK], rows=[len(wanted)])
        items, inputs, outputs = [], [], []
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            item, start = self._items[number], self._starts[number]
            local = wanted[bounds[number] : bounds[number + 1]] - start
            rows = int(self._starts[number + 1] - start)
            items.append(item)
            try:
                inputs.append([_cut(item.batch.inputs[place], local, rows) for place in self._inputs])
                outputs.append([_cut(item.batch.outputs[place], local, rows) for place in self._outputs])
            except _UNREADABLE as error:
                raise Malformed(item.index, str(error)) from error
        if not items:
            return Observations(0)
        first, count = items[0].batch, len(wanted)
        for place, cuts in zip(self._inputs, zip(*inputs, strict=True), strict=True):
            parts.inputs.append(_stacked(first.inputs[place], cuts, count))
        for place, cuts in zip(self._outputs, zip(*outputs, strict=True), strict=True):
            parts.outputs.append(_stacked(first.outputs[place], cuts, count))
        try:
            seen = observe(parts, self._signature)
        except _UNREADABLE:
            _blame(items, self._signature)
            raise
        if any("\0" in name for name in (*seen.numeric, *seen.categorical)):
            raise Malformed(items[0].index, "a tensor's name holds a NUL")
        return seen

    def _watched(self) -> tuple[Places, Places]:
        codes: list[int] = []
        rows: list[int] = []
        origins: list[int] = []
        ends = [0]
        for item in self._items:
            batch = item.batch
            count = len(batch.codes)
            if len(batch.rows) != count or len(batch.origins) not in (0, count):
                raise Malformed(item.index, "codes, rows and origins differ in length")
            codes += batch.codes[:]
            rows += batch.rows[:]
            origins += batch.origins[:] or [Origin.ORIGIN_ONLINE] * count
            ends.append(ends[-1] + count)
        answered = np.where(
            np.array(codes, dtype=np.int64) == Code.CODE_OK, np.array(rows, dtype=np.int64), 0
        )
        starts = np.concatenate(([0], np.cumsum(answered)))[ends]
        for item, count in zip(self._items, np.diff(starts).tolist(), strict=True):
            self._check(item, count)
        watched = np.isin(np.array(origins, dtype=np.int64), WATCHED)
        return np.flatnonzero(np.repeat(watched, answered)), starts

    def _check(self, item: Numbered, rows: int) -> None:
        tensors = [item.batch.inputs[place] for place in self._inputs]
        tensors += [item.batch.outputs[place] for place in self._outputs]
        for tensor in tensors:
            if not tensor.shape or tensor.shape[0] != rows:
                raise Malformed(item.index, f"{tensor.name} is no tensor of {rows} rows")


def observe_all(items: Sequence[Numbered], signature: Signature) -> Iterator[Run]:
    """The watched rows of all `items`, one run per neighbours of one layout.

    Raises Malformed naming the first record that cannot be read.
    """
    run: list[Numbered] = []
    shared: Layout | None = None
    for item in items:
        layout = _layout(item.batch)
        if run and layout != shared:
            yield Run(run, signature)
            run = []
        shared = layout
        run.append(item)
    if run:
        yield Run(run, signature)


def _blame(run: Sequence[Numbered], signature: Signature) -> None:
    for item in run:
        try:
            observe(item.batch, signature)
        except _UNREADABLE as error:
            raise Malformed(item.index, str(error)) from error


def _layout(batch: PredictionBatch) -> Layout:
    tensors = tuple((t.name, t.datatype, tuple(t.shape[1:])) for t in (*batch.inputs, *batch.outputs))
    return batch.exclude_from_drift, tensors


def _cut(tensor: Tensor, local: Places, rows: int) -> bytes:
    """The data of some of its rows; of all of them as it is."""
    data, shape = tensor.data, tensor.shape[:]
    if len(local) == rows:
        kind = NUMPY_TYPES.get(tensor.datatype)
        if kind is not None and len(data) != prod(shape) * kind.itemsize:
            raise InvalidArgument(f"{len(data)} bytes do not fill a tensor of shape {list(shape)}")
        return data
    chosen = to_array(data, tensor.datatype, shape)[local]
    return encode_bytes(chosen.ravel().tolist()) if chosen.dtype == object else chosen.tobytes()


def _stacked(like: Tensor, cuts: Sequence[bytes], rows: int) -> Tensor:
    """One tensor of the rows of all. Row-major tensors are joined by their bytes."""
    return Tensor(name=like.name, datatype=like.datatype, shape=[rows, *like.shape[1:]], data=b"".join(cuts))


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea & Flood, OOPSLA 2014): every bit depends on every other."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
