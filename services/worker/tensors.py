"""Tensors between the wire (raw little-endian bytes) and the backends (numpy arrays).

Rows of row-major tensors are contiguous, so requests are merged by joining their bytes and answers cut by
slicing them; an array is only ever a view on such bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from headrace.v1.tensor_pb2 import DataType
from numpy.typing import NDArray

from services.common.errors import InvalidArgument

Array = NDArray[Any]

#: BF16 has no numpy type; backends that take it see its bits as uint16.
NUMPY_TYPES: dict[int, np.dtype[np.generic]] = {
    DataType.DATA_TYPE_BOOL: np.dtype(np.bool_),
    DataType.DATA_TYPE_UINT8: np.dtype("<u1"),
    DataType.DATA_TYPE_UINT16: np.dtype("<u2"),
    DataType.DATA_TYPE_UINT32: np.dtype("<u4"),
    DataType.DATA_TYPE_UINT64: np.dtype("<u8"),
    DataType.DATA_TYPE_INT8: np.dtype("<i1"),
    DataType.DATA_TYPE_INT16: np.dtype("<i2"),
    DataType.DATA_TYPE_INT32: np.dtype("<i4"),
    DataType.DATA_TYPE_INT64: np.dtype("<i8"),
    DataType.DATA_TYPE_FP16: np.dtype("<f2"),
    DataType.DATA_TYPE_FP32: np.dtype("<f4"),
    DataType.DATA_TYPE_FP64: np.dtype("<f8"),
    DataType.DATA_TYPE_BF16: np.dtype("<u2"),
}

_LENGTH = struct.Struct("<I")


def datatype_name(datatype: int) -> str:
    """`FP32` for DATA_TYPE_FP32; the number itself for one that this build does not know."""
    try:
        return DataType.Name(datatype).removeprefix("DATA_TYPE_")
    except ValueError:
        return str(datatype)


def decode_bytes(data: bytes) -> list[bytes]:
    """The elements of a BYTES tensor. Raises InvalidArgument when a length points outside of `data`."""
    elements, position, end = [], 0, len(data)
    while position < end:
        start = position + 4
        if start > end:
            raise InvalidArgument("a BYTES tensor ends inside of a length")
        position = start + _LENGTH.unpack_from(data, start - 4)[0]
        if position > end:
            raise InvalidArgument("a BYTES tensor holds a length that points past its end")
        elements.append(data[start:position])
    return elements


def encode_bytes(elements: Iterable[bytes]) -> bytes:
    """The elements as a BYTES tensor's data."""
    return b"".join([part for element in elements for part in (_LENGTH.pack(len(element)), element)])


def to_array(data: bytes, datatype: int, shape: Sequence[int]) -> Array:
    """`data` as an array of `shape`: a read-only view, or for BYTES an object array of `bytes`."""
    if datatype == DataType.DATA_TYPE_BYTES:
        array = np.empty(prod(shape), dtype=object)
        array[:] = decode_bytes(data)
        return array.reshape(shape)
    return np.frombuffer(data, NUMPY_TYPES[datatype]).reshape(shape)


@dataclass(frozen=True, slots=True)
class OutputColumn:
    """One output of a whole batch: `data` in row order and where each row begins.

    `shape` is one row's shape; for a model that is not batched the whole tensor's, and there is one row.
    `starts` is None where every row takes `stride` bytes, else row i lies in starts[i] … starts[i + 1]."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    data: bytes
    stride: int
    starts: tuple[int, ...] | None = None

    def rows(self, first: int, count: int) -> bytes:
        """The bytes of `count` rows from `first`."""
        if self.starts is None:
            return self.data[first * self.stride : (first + count) * self.stride]
        return self.data[self.starts[first] : self.starts[first + count]]


def to_column(name: str, datatype: DataType, array: Array, rows: int, *, batched: bool) -> OutputColumn:
    """What a backend returned for `rows` rows. Raises ValueError when the array does not hold that many
    rows."""
    if batched and (array.ndim == 0 or array.shape[0] != rows):
        raise ValueError(f"output {name} has shape {list(array.shape)} for {rows} rows of input")
    shape = array.shape[1:] if batched else array.shape
    if datatype == DataType.DATA_TYPE_BYTES:
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
    data = array.tobytes()
    return OutputColumn(name, datatype, shape, data, len(data) // (rows if batched else 1))
