"""Frames with large tensors, read without copying these.

A protobuf parser copies every field of bytes, and once more for who asks for it; for a router, which passes
tensors on, twice for nothing. Here a frame is walked by hand as far as its large tensors, and parsed without
their data, which stays where it arrived and is handed on as views. Whatever is unusual about a frame is left
to the parser: it reads it, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from headrace.v1.tensor_pb2 import DataType

from services.common.frames.messages import varint

#: Bytes, or a view on them where they arrived.
Buffer = bytes | memoryview

#: Of an item, and of a tensor's data: smaller ones are copied in less time than they are found.
LARGE_BYTES: Final = 32 << 10
#: Wire types: varint, eight bytes, length-delimited, four bytes.
_VARINT, _EIGHT, _DELIMITED, _FOUR = 0, 1, 2, 5
#: Field 2 of RequestFrame (items), 4 of PredictRequest (inputs), 4 of Tensor (data), each length-delimited;
#: field 2 of Tensor (datatype), a varint.
_ITEMS, _INPUTS, _DATA, _DATATYPE = 0x12, 0x22, 0x22, 0x10
#: Their elements are checked one by one by who takes them.
_CHECKED: Final = frozenset({DataType.DATA_TYPE_BYTES, DataType.DATA_TYPE_BOOL})


class Detached:
    """A RequestFrame: `frame` is it without the data of large tensors, `items` its items as they stand, and
    `contents` by an item's position the data of its inputs, None where it is still in `frame`. Where it came
    in parts, `apart` is what stands before what `items` has of its only item."""

    __slots__ = ("apart", "contents", "frame", "items")

    def __init__(self) -> None:
        self.frame = b""
        self.items: list[Buffer] = []
        self.apart: tuple[Buffer, ...] = ()
        self.contents: dict[int, list[memoryview | None]] = {}


class _Unusual(Exception):
    """For the parser to judge."""


def detach(payload: bytes) -> Detached | None:
    """`payload`, a serialized RequestFrame, in parts; None where it has no large tensor, or is unusual."""
    found = Detached()
    try:
        _walk_frame(payload, found)
    except (_Unusual, IndexError):
        return None
    return found if found.contents else None


def detach_parts(parts: Collection[Buffer]) -> Detached | None:
    """The same of a RequestFrame that comes in parts: the header of its only item, then heads of tensors,
    each before its data, and the rest of the item. None where they are anything else."""
    _item_header, *pieces = parts
    found = Detached()
    found.apart, found.items = tuple(pieces[:-1]), pieces[-1:]
    small: list[bytes] = []
    views: list[memoryview] = []
    try:
        for piece in pieces:
            if len(piece) < LARGE_BYTES:
                small.append(bytes(piece))
            elif len(small) != len(views) + 1:
                return None
            else:
                small.append(_without_announced(small.pop(), len(piece)))
                views.append(memoryview(piece))
        if not views:
            return None
        item = b"".join(small)
        contents: list[memoryview | None] = [*views]
        at = sum([len(head) for head in small[: len(views)]])
        while at < len(item):
            tag, at = _number(item, at, len(item))
            _start, at = _value(item, tag & 7, at, len(item))
            if tag == _INPUTS:
                contents.append(None)
    except (_Unusual, IndexError):
        return None
    found.contents[0] = contents
    found.frame = b"".join((b"\x12", varint(len(item)), item))
    return found


def _without_announced(head: bytes, size: int) -> bytes:
    """An input without data, of one whose `head` stands before `size` bytes of it."""
    end = len(head)
    announced = b"\x22" + varint(size)
    if head[0] != _INPUTS or not head.endswith(announced):
        raise _Unusual
    length, start = _number(head, 1, end)
    if length != end - start + size:
        raise _Unusual
    last = end - len(announced)
    at, datatype = start, 0
    while at < last:
        tag, at = _number(head, at, last)
        if tag == _DATATYPE:
            datatype, at = _number(head, at, last)
        elif tag == _DATA:
            raise _Unusual
        else:
            _start, at = _value(head, tag & 7, at, last)
    if datatype in _CHECKED:
        raise _Unusual
    return b"\x22" + varint(last - start) + head[start:last]


def _walk_frame(payload: bytes, found: Detached) -> None:
    at, end = 0, len(payload)
    view = memoryview(payload)
    kept: list[bytes] = []
    copied = 0
    while at < end:
        begin = at
        tag, at = _number(payload, at, end)
        start, stop = _value(payload, tag & 7, at, end)
        at = stop
        if tag != _ITEMS:
            continue
        if stop - start < LARGE_BYTES:
            found.items.append(payload[start:stop])
            continue
        found.items.append(view[start:stop])
        contents: list[memoryview | None] = []
        item = _without_data(payload, view, start, stop, contents)
        if item is not None:
            found.contents[len(found.items) - 1] = contents
            kept += (payload[copied:begin], b"\x12", varint(len(item)), item)
            copied = stop
    if found.contents:
        kept.append(payload[copied:])
        found.frame = b"".join(kept)


def _without_data(
    payload: bytes, view: memoryview, at: int, end: int, contents: list[memoryview | None]
) -> bytes | None:
    """The PredictRequest `payload[at:end]` without the data that is put into `contents`, an entry for every
    input; None where none is large."""
    kept: list[bytes] = []
    copied = at
    while at < end:
        begin = at
        tag, at = _number(payload, at, end)
        start, stop = _value(payload, tag & 7, at, end)
        at = stop
        if tag != _INPUTS:
            continue
        place = _data_place(payload, start, stop) if stop - start >= LARGE_BYTES else None
        if place is None:
            contents.append(None)
            continue
        field, first, last = place
        contents.append(view[first:last])
        tensor = payload[start:field] + payload[last:stop]
        kept += (payload[copied:begin], b"\x22", varint(len(tensor)), tensor)
        copied = stop
    if not kept:
        return None
    kept.append(payload[copied:end])
    return b"".join(kept)


def _data_place(payload: bytes, at: int, end: int) -> tuple[int, int, int] | None:
    """Where the data of the Tensor `payload[at:end]` stands, with its tag and without: begin of the field,
    begin and end of the bytes. None where it stays there."""
    place: tuple[int, int, int] | None = None
    datatype = 0
    while at < end:
        begin = at
        tag, at = _number(payload, at, end)
        if tag == _DATATYPE:
            datatype, at = _number(payload, at, end)
            continue
        start, stop = _value(payload, tag & 7, at, end)
        at = stop
        if tag == _DATA:
            if place is not None:
                raise _Unusual
            place = begin, start, stop
    if place is None or place[2] - place[1] < LARGE_BYTES or datatype in _CHECKED:
        return None
    return place


def _number(payload: bytes, at: int, end: int) -> tuple[int, int]:
    """The varint at `at`, and where it ends."""
    number = shift = 0
    while at < end and shift < 64:
        byte = payload[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
    raise _Unusual


def _value(payload: bytes, wire_type: int, at: int, end: int) -> tuple[int, int]:
    """Where the value of a field begins and ends."""
    if wire_type == _DELIMITED:
        size, at = _number(payload, at, end)
        stop = at + size
    elif wire_type == _VARINT:
        _ignored, stop = _number(payload, at, end)
    elif wire_type == _EIGHT:
        stop = at + 8
    elif wire_type == _FOUR:
        stop = at + 4
    else:
        raise _Unusual
    if stop > end:
        raise _Unusual
    return at, stop
