"""The element types of the Open Inference Protocol: their names, numpy types and widths, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from headrace.v1.tensor_pb2 import DataType


@dataclass(frozen=True, slots=True)
class Datatype:
    """One element type. `itemsize` is bytes per element on the wire, 0 for BYTES (each has its own length).

    `dtype` is little-endian as on the wire; None for BYTES and BF16, which numpy does not have. `code` is the
    struct format of one element, empty where there is none; `low` and `high` bound integers.
    """

    name: str
    number: DataType
    dtype: np.dtype[np.generic] | None
    itemsize: int
    code: str
    python: type

    @property
    def low(self) -> int:
        """Smallest integer the type holds."""
        return 0 if self.code.isupper() else -(1 << (8 * self.itemsize - 1))

    @property
    def high(self) -> int:
        """Largest integer the type holds."""
        bits = 8 * self.itemsize
        return (1 << bits) - 1 if self.code.isupper() else (1 << (bits - 1)) - 1


def _datatype(name: str, code: str, python: type, dtype: str = "") -> Datatype:
    kind = np.dtype(dtype) if dtype else None
    size = kind.itemsize if kind is not None else {"BYTES": 0, "BF16": 2}[name]
    return Datatype(name, cast("DataType", DataType.Value(f"DATA_TYPE_{name}")), kind, size, code, python)


_ALL = (
    _datatype("BOOL", "?", bool, "?"),
    _datatype("UINT8", "B", int, "u1"),
    _datatype("UINT16", "H", int, "<u2"),
    _datatype("UINT32", "I", int, "<u4"),
    _datatype("UINT64", "Q", int, "<u8"),
    _datatype("INT8", "b", int, "i1"),
    _datatype("INT16", "h", int, "<i2"),
    _datatype("INT32", "i", int, "<i4"),
    _datatype("INT64", "q", int, "<i8"),
    _datatype("FP16", "e", float, "<f2"),
    _datatype("FP32", "f", float, "<f4"),
    _datatype("FP64", "d", float, "<f8"),
    _datatype("BYTES", "", str),
    _datatype("BF16", "", float),
)

BY_NUMBER: dict[int, Datatype] = {datatype.number: datatype for datatype in _ALL}
BY_NAME: dict[str, Datatype] = {datatype.name: datatype for datatype in _ALL}

BOOL = BY_NAME["BOOL"]
BYTES = BY_NAME["BYTES"]
BF16 = BY_NAME["BF16"]
