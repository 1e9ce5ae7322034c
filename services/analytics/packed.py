"""Columns of numbers out of serialized records, as arrays: by the bytes in which protobuf packs them. A list
of Python's numbers between the two would be half of what a row costs until it is a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from headrace.v1.events_pb2 import PredictionBatch
from numpy.typing import NDArray

#: Types that are packed as they are, with what numpy calls them; all others are varints.
_FIXED = {FieldDescriptor.TYPE_FIXED64: "<u8", FieldDescriptor.TYPE_FLOAT: "<f4"}
_FIELDS = {field.name: (field.number, field.type) for field in PredictionBatch.DESCRIPTOR.fields}
#: Bytes of a wire type's values that are not skipped by looking at them.
_SKIPPED = {1: 8, 5: 4}


class Packed:
    """Where the packed fields of serialized PredictionBatches lie, one record after another. The records have
    been parsed before, so they are known to be well-formed."""

    def __init__(self, values: Sequence[bytes]) -> None:
        self._parts: dict[int, list[memoryview]] = {}
        for value in values:
            self._walk(value)

    def numbers(self, field: str, count: int) -> NDArray[Any] | None:
        """The entries of a repeated field of all records, one after another: float32 of floats, else uint64.
        None where they are not `count`: protobuf also reads fields that are not packed."""
        number, kind = _FIELDS[field]
        data = np.frombuffer(b"".join(self._parts.get(number, [])), np.uint8)
        fixed = _FIXED.get(kind)
        if fixed is not None:
            return data.view(fixed) if data.size == count * np.dtype(fixed).itemsize else None
        ends = np.flatnonzero(data < 0x80)
        return _varints(data, ends) if ends.size == count else None

    def _walk(self, value: bytes) -> None:
        view, at, end = memoryview(value), 0, len(value)
        while at < end:
            tag, at = _varint(value, at)
            kind = tag & 7
            if kind == 2:
                length, at = _varint(value, at)
                self._parts.setdefault(tag >> 3, []).append(view[at : at + length])
                at += length
            elif kind == 0:
                _, at = _varint(value, at)
            elif kind in _SKIPPED:
                at += _SKIPPED[kind]
            else:
                return  # a group, which no release has written: what follows is missing, and seen to be


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a place, and where it ends."""
    byte = data[at]
    number, shift = byte & 0x7F, 7
    while byte >= 0x80:
        at += 1
        byte = data[at]
        number |= (byte & 0x7F) << shift
        shift += 7
    return number, at + 1


def _varints(data: NDArray[np.uint8], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    if ends.size == data.size:
        return data.astype(np.uint64)
    starts = np.concatenate(([0], ends[:-1] + 1))
    numbers = np.zeros(ends.size, dtype=np.uint64)
    for place in range(int((ends - starts).max()) + 1):
        # Beyond a number's end its last byte is looked at again, and counts for nothing.
        at = starts + place
        bits = (data[np.minimum(at, ends)] & 0x7F).astype(np.uint64) << np.uint64(7 * place)
        numbers |= np.where(at <= ends, bits, np.uint64(0))
    return numbers
