"""Protobuf fields written by hand, for messages of which most bytes are the same each time: replies and
records of the prediction log. Tests hold them against the generated code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

_ONE: Final = tuple(bytes((n,)) for n in range(128))
_TWO: Final = tuple(bytes((n & 127 | 128, n >> 7)) for n in range(1 << 14))
_MORE: Final = tuple(bytes((n | 128,)) for n in range(128))


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Kept(dict[_Key, _Value]):
    """Bytes that were made before. Starts over where it would hold more than `most`: what is needed now comes
    back first."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: _Key, value: _Value) -> None:
        if len(self) >= self._most:
            self.clear()
        super().__setitem__(key, value)


def varint(number: int) -> bytes:
    """`number`, not negative."""
    if number < 128:
        return _ONE[number]
    if number < 16384:
        return _TWO[number]
    return _MORE[number & 127] + varint(number >> 7)


def tag(field: int, wire_type: int) -> bytes:
    """What precedes a field's value; wire type 0: varint, 1: eight bytes, 2: length-delimited."""
    return varint(field << 3 | wire_type)


def delimited(field: int, data: bytes) -> bytes:
    """A field of bytes, text, a message or packed numbers."""
    return tag(field, 2) + varint(len(data)) + data


def tensor_head(field: bytes, name: bytes, datatype: int, shape: Iterable[int], nbytes: int) -> bytes:
    """All that precedes a Tensor's `nbytes` bytes of data, with the tag of the `field` that it is in."""
    head = delimited(1, name) + tag(2, 0) + varint(datatype)
    dimensions = b"".join([varint(size) for size in shape])
    if dimensions:
        head += delimited(3, dimensions)
    head += tag(4, 2) + varint(nbytes)
    return field + varint(len(head) + nbytes) + head
