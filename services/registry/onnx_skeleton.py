"""An ONNX file without its weights, so that reading a signature takes the same memory for 1 MB and 1 GB.

The file is walked in protobuf's wire format (protobuf.dev/programming-guides/encoding) through a memory
map; payloads of tensors are stepped over, everything else is copied as it stands.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

#: Payloads up to this size stay: they are cheap, and constants such as class labels are among them.
_SMALL = 4096
#: What may be left of a file; protobuf itself refuses 2 GB.
_MOST = 1 << 30
#: As deep as protobuf's own parser goes.
_DEPTH = 100

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

#: Field number → kind of the message inside, for each kind that leads to tensors (onnx.proto).
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {},
}
#: float_data, int32_data, string_data, int64_data, raw_data, double_data, uint64_data.
_PAYLOAD = {"tensor": frozenset({4, 5, 6, 7, 9, 10, 11})}
#: floats and ints of an attribute: unpacked, millions of fields in a large forest, and no tensor behind them.
_LISTS = {"attribute": frozenset({7, 8})}


def skeleton(path: Path) -> bytes:
    """The serialized ModelProto at `path` without tensor payloads above 4 KB. Blocking.

    Raises ValueError where the file is empty, cut short, no protobuf, nested too deep, or where more than
    1 GB is left.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
            return bytes(_thinned(data, 0, len(data), "model", _DEPTH))


def _thinned(data: memoryview, at: int, end: int, kind: str, depth: int) -> bytearray:
    """The message of `kind` in `data[at:end]` without large payloads."""
    if not depth:
        raise ValueError("messages are nested too deep")
    kept = bytearray()
    inside, payload, lists = _INSIDE[kind], _PAYLOAD.get(kind, ()), _LISTS.get(kind, ())
    copied = at  # everything before is in `kept` or left out
    while at < end:
        start = at
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if number in lists:
            break
        at, body = _skip(data, at, end, wire)
        large = wire == _BYTES and at - body > _SMALL
        if large and number in payload:
            kept += data[copied:start]
            copied = at
        elif large and number in inside:
            inner = _thinned(data, body, at, inside[number], depth - 1)
            kept += data[copied:start]
            kept += _encoded(key) + _encoded(len(inner))
            kept += inner
            copied = at
    if end - copied + len(kept) > _MOST:
        raise ValueError("more than 1 GB is left beside the weights")
    kept += data[copied:end]
    return kept


def _skip(data: memoryview, at: int, end: int, wire: int) -> tuple[int, int]:
    """Where the field that begins at `at` ends, and where its content begins."""
    body = at
    if wire == _VARINT:
        _value, after = _varint(data, at, end)
    elif wire == _BYTES:
        size, body = _varint(data, at, end)
        after = body + size
    elif wire in (_FIXED64, _FIXED32):
        after = at + (8 if wire == _FIXED64 else 4)
    else:
        raise ValueError(f"wire type {wire} is not in use")
    if after > end:
        raise ValueError("the file is cut short")
    return after, body


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError("the file is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than 64 bits")


def _encoded(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
