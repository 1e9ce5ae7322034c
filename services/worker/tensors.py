"""Tensors between the wire (raw little-endian bytes) and the backends (numpy arrays).

Rows of row-major tensors are contiguous, so requests are merged by joining their bytes and answers cut by
slicing them; an array is only ever a view on such bytes."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from headrace.v1.tensor_pb2 import DataType
from numpy.typing import NDArray

from services.common.tensors import NUMPY_TYPES, Buffer, decode_bytes, encode_bytes, to_array

__all__ = [
    "NUMPY_TYPES",
    "Array",
    "Buffer",
    "OutputColumn",
    "datatype_name",
    "decode_bytes",
    "encode_bytes",
    "to_array",
    "to_column",
]

Array = NDArray[Any]
# A look-up in the generated enumeration costs a tenth of a microsecond each time.
_BYTES = DataType.DATA_TYPE_BYTES
#: What is smaller is copied sooner than looked at where it lies: slices of bytes are cheaper than of views.
_VIEWED_BYTES = 16 << 10


def datatype_name(datatype: int) -> str:
    """`FP32` for DATA_TYPE_FP32; the number itself for one that this build does not know."""
    try:
        return DataType.Name(datatype).removeprefix("DATA_TYPE_")
    except ValueError:
        return str(datatype)


class OutputColumn:
    """One output of a whole batch: `data` in row order and where each row begins.

    `shape` is one row's shape; for a model that is not batched the whole tensor's, and there is one row.
    `starts` is None where every row takes `stride` bytes, else row i lies in starts[i] … starts[i + 1]."""

    __slots__ = ("data", "datatype", "name", "shape", "starts", "stride")

    def __init__(
        self,
        name: str,
        datatype: DataType,
        shape: tuple[int, ...],
        data: Buffer,
        stride: int,
        starts: tuple[int, ...] | None = None,
    ) -> None:
        self.name = name
        self.datatype = datatype
        self.shape = shape
        self.data = data
        self.stride = stride
        self.starts = starts

    def rows(self, first: int, count: int) -> Buffer:
        """The bytes of `count` rows from `first`."""
        if self.starts is None:
            return self.data[first * self.stride : (first + count) * self.stride]
        return self.data[self.starts[first] : self.starts[first + count]]


def to_column(name: str, datatype: DataType, array: Array, rows: int, *, batched: bool) -> OutputColumn:
    """What a backend returned for `rows` rows; where that is long, `data` is the array itself. Raises
    ValueError when the array does not hold that many rows."""
    if batched and (array.ndim == 0 or array.shape[0] != rows):
        raise ValueError(f"output {name} has shape {list(array.shape)} for {rows} rows of input")
    shape = array.shape[1:] if batched else array.shape
    if datatype == _BYTES:
        per_row = prod(shape) if batched else array.size
        elements = [
            element if isinstance(element, bytes) else str(element).encode() for element in array.flat
        ]
        count = rows if batched else 1
        parts = [encode_bytes(elements[i * per_row : (i + 1) * per_row]) for i in range(count)]
        starts = tuple(accumulate((len(part) for part in parts), initial=0))
        return OutputColumn(name, datatype, shape, b"".join(parts), 0, starts)
    wanted = NUMPY_TYPES[datatype]
    if array.dtype != wanted:
        array = array.astype(wanted)
    data: Buffer
    if array.nbytes >= _VIEWED_BYTES and array.flags.c_contiguous:
        data = array.reshape(-1).view(np.uint8).data
    else:
        data = array.tobytes()
    return OutputColumn(name, datatype, shape, data, len(data) // (rows if batched else 1))
