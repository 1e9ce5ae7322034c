"""Arrow arrays from numpy arrays and lists by their buffers. `pa.array` does the same, but looks first
whether it was given something of pandas, and imports that for it: longer than a minute's records take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def numbers_array(values: NDArray[Any]) -> pa.Array:
    """One of the same type, without nulls; truth values become bits."""
    if values.dtype == np.bool_:
        bits = np.packbits(values, bitorder="little")
        return pa.Array.from_buffers(pa.bool_(), values.size, [None, pa.py_buffer(bits)])
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, values.size, [None, pa.py_buffer(np.ascontiguousarray(values))])


def to_numpy(array: pa.Array) -> NDArray[Any]:
    """What `numbers_array` was given."""
    data = array.buffers()[1]
    if pa.types.is_boolean(array.type):
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=len(array), bitorder="little")
        return bits.astype(np.bool_)
    return np.frombuffer(data, array.type.to_pandas_dtype(), count=len(array))


def texts_array(values: Sequence[str]) -> pa.Array:
    """Strings, none of them null."""
    return _variable(pa.string(), [value.encode("utf-8", "surrogatepass") for value in values])


def bytes_array(values: Sequence[bytes]) -> pa.Array:
    """Byte strings, none of them null."""
    return _variable(pa.binary(), values)


def _variable(kind: pa.DataType, values: Sequence[bytes]) -> pa.Array:
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(kind, len(values), buffers)
