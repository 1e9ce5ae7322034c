"""Tensors between the wire (raw little-endian bytes) and numpy."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from math import prod

import numpy as np
from headrace.v1.tensor_pb2 import DataType
from numpy.typing import NDArray

from services.common.errors import InvalidArgument

Array = NDArray[np.generic]
#: Bytes of a tensor, or a view on them where they arrived.
Buffer = bytes | memoryview

#: BF16 has no numpy type; who takes it sees its bits as uint16.
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

# Looking it up in the generated enumeration costs more than the rest of the check.
_BYTES = DataType.DATA_TYPE_BYTES
_LENGTH = struct.Struct("<I")


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


def to_array(data: Buffer, datatype: int, shape: Sequence[int]) -> Array:
    """`data` as an array of `shape`: a read-only view, or for BYTES an object array of `bytes`.

    Raises InvalidArgument where the bytes are not as many as datatype and shape ask for.
    """
    try:
        if datatype == _BYTES:
            return _texts(decode_bytes(bytes(data)), shape)
        return np.frombuffer(data, NUMPY_TYPES[datatype]).reshape(shape)
    except (ValueError, KeyError) as error:
        raise InvalidArgument(f"{len(data)} bytes do not fill a tensor of shape {list(shape)}") from error


def _texts(elements: list[bytes], shape: Sequence[int]) -> Array:
    if len(elements) != prod(shape):  # numpy would repeat a single one
        raise ValueError("the elements are not as many as the shape says")
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)
