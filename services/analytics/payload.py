"""Tensors of many records as list columns: each request's own elements, and the answer among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import pyarrow as pa
from headrace.v1.tensor_pb2 import DataType, Tensor
from numpy.typing import NDArray

from services.analytics.arrays import bytes_array, numbers_array, texts_array, to_numpy
from services.common.errors import InvalidArgument
from services.common.tensors import NUMPY_TYPES, decode_bytes

#: Wider answers than that (embeddings) are no class scores.
_MAX_CLASSES = 1000


@dataclass(frozen=True, slots=True)
class Answered:
    """Which requests have rows in the tensors of their record: `ok` and `rows` over all requests, `counts`,
    `ok_counts` and `ok_rows` over records."""

    counts: NDArray[np.int64]
    ok: NDArray[np.bool_]
    rows: NDArray[np.int64]
    ok_counts: NDArray[np.int64]
    ok_rows: NDArray[np.int64]

    @classmethod
    def of(cls, counts: NDArray[np.int64], ok: NDArray[np.bool_], rows: NDArray[np.int64]) -> Answered:
        starts = np.cumsum(counts) - counts
        answered_rows = np.where(ok, rows, 0)
        return cls(
            counts,
            ok,
            answered_rows,
            np.add.reduceat(ok.astype(np.int64), starts),
            np.add.reduceat(answered_rows, starts),
        )


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of one name of all records, end to end. Over records: `widths` elements a row, `whole`
    where one request owns the tensor as it is, `fits` where the tensor is one of these requests."""

    flat: pa.Array
    datatype: int
    row_shape: tuple[int, ...]
    widths: NDArray[np.int64]
    whole: NDArray[np.bool_]
    fits: NDArray[np.bool_]

    def rows(self, answered: Answered) -> NDArray[np.int64]:
        """How many rows each request has in it."""
        whole = np.repeat(self.whole, answered.counts)
        rows = np.where(whole, answered.ok.astype(np.int64), answered.rows)
        return np.where(np.repeat(self.fits, answered.counts), rows, 0)

    def here(self, answered: Answered) -> NDArray[np.bool_]:
        """Which requests have elements in it."""
        return answered.ok & np.repeat(self.fits, answered.counts)

    def column(self, name: str, answered: Answered) -> tuple[pa.Field, pa.Array]:
        """Each request's elements, row-major; null where it has none. The metadata say datatype and shape of
        a row."""
        lengths = self.rows(answered) * np.repeat(self.widths, answered.counts)
        offsets = numbers_array(np.concatenate(([0], np.cumsum(lengths))))
        absent = numbers_array(~self.here(answered))
        values = pa.LargeListArray.from_arrays(offsets, self.flat, mask=absent)
        shape = ",".join(str(size) for size in self.row_shape)
        return pa.field(
            name, values.type, metadata={"datatype": str(self.datatype), "row_shape": shape}
        ), values


def tensors_by_name(tensors_of: Sequence[Sequence[Tensor]], answered: Answered) -> dict[str, Tensors]:
    """The tensors by name, in the order in which the first record that has them names them."""
    by_name: dict[str, list[Tensor | None]] = {}
    for place, tensors in enumerate(tensors_of):
        for tensor in tensors:
            name = tensor.name
            column = by_name.get(name)
            if column is None:
                column = by_name[name] = [None] * len(tensors_of)
            column[place] = tensor
    joined = {name: _join(tensors, answered) for name, tensors in by_name.items()}
    return {name: tensors for name, tensors in joined.items() if tensors is not None}


def _join(tensors: Sequence[Tensor | None], answered: Answered) -> Tensors | None:
    """None where no tensor is one of its requests."""
    widths, whole, fits = [0] * len(tensors), [False] * len(tensors), [False] * len(tensors)
    datatype, data, shapes = 0, [], set()
    ok_rows, ok_counts = answered.ok_rows.tolist(), answered.ok_counts.tolist()
    for place, tensor in enumerate(tensors):
        if tensor is None or datatype not in (0, tensor.datatype):
            continue
        shape = tuple(tensor.shape[:])
        batched = bool(shape) and shape[0] == ok_rows[place]
        # A model without a batch dimension answers one request a run, which owns the tensor as it is.
        if not batched and ok_counts[place] != 1:
            continue
        content, kind = tensor.data, tensor.datatype
        if not _fills(content, kind, prod(shape)):
            continue
        row_shape = shape[1:] if batched else shape
        datatype = kind
        widths[place], whole[place], fits[place] = prod(row_shape), not batched, True
        data.append(content)
        shapes.add(row_shape)
    if not data:
        return None
    row_shape = shapes.pop() if len(shapes) == 1 else ()
    return Tensors(
        _flat(b"".join(data), datatype),
        datatype,
        row_shape,
        np.array(widths, dtype=np.int64),
        np.array(whole),
        np.array(fits),
    )


def _fills(data: bytes, datatype: int, elements: int) -> bool:
    if datatype in NUMPY_TYPES:
        return len(data) == elements * NUMPY_TYPES[datatype].itemsize
    if datatype != DataType.DATA_TYPE_BYTES:
        return False
    try:
        return len(decode_bytes(data)) == elements
    except InvalidArgument:
        return False


def _flat(data: bytes, datatype: int) -> pa.Array:
    if datatype == DataType.DATA_TYPE_BYTES:
        return bytes_array(decode_bytes(data))
    array = np.frombuffer(data, NUMPY_TYPES[datatype])
    if datatype == DataType.DATA_TYPE_BF16:
        return numbers_array((array.astype(np.uint32) << 16).view(np.float32))
    if datatype == DataType.DATA_TYPE_FP16:
        return numbers_array(array.astype(np.float32))
    return numbers_array(array)


def predictions(tensors: Tensors | None, answered: Answered) -> tuple[pa.Array, pa.Array]:
    """The answer per row of each request, as numbers and as texts; null where there is none.

    One value a row is the answer; several are scores of classes, whose best is.
    """
    nothing = np.zeros(answered.ok.size, dtype=np.int64)
    numbers, texts = numbers_array(np.zeros(0)), texts_array([])
    number_rows = text_rows = None
    if tensors is not None and np.unique(tensors.widths[tensors.fits]).size == 1:
        width = int(tensors.widths[tensors.fits][0])
        rows = tensors.rows(answered)
        if tensors.datatype == DataType.DATA_TYPE_BYTES:
            if width == 1:
                words = [one.decode("utf-8", "replace") for one in tensors.flat.to_pylist()]
                texts, text_rows = texts_array(words), rows
        elif 1 <= width <= _MAX_CLASSES:
            table = to_numpy(tensors.flat).reshape(-1, width)
            best = table[:, 0] if width == 1 else np.argmax(table, axis=1)
            numbers, number_rows = numbers_array(best.astype(np.float64)), rows
    here = np.zeros(answered.ok.size, dtype=bool) if tensors is None else tensors.here(answered)
    return (
        _lists(numbers, nothing if number_rows is None else number_rows, here & (number_rows is not None)),
        _lists(texts, nothing if text_rows is None else text_rows, here & (text_rows is not None)),
    )


def _lists(flat: pa.Array, lengths: NDArray[np.int64], here: NDArray[np.bool_]) -> pa.Array:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(numbers_array(offsets), flat, mask=numbers_array(~here))
