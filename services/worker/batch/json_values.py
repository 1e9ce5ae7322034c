"""Values decoded from JSON against an input's element type and shape, one by one and all at once."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from headrace.v1.tensor_pb2 import DataType

from services.worker.batch.rows import InputSpec
from services.worker.tensors import Array

_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
_BOOL, _BF16 = DataType.DATA_TYPE_BOOL, DataType.DATA_TYPE_BF16
_TAKEN: dict[str, frozenset[type]] = {
    "b": frozenset({bool}),
    "i": frozenset({int}),
    "u": frozenset({int}),
    "f": frozenset({int, float}),
    "O": frozenset({str}),
}


def json_name(value: Any) -> str:
    """What JSON calls `value`."""
    return "null" if value is None else _NAMES.get(type(value), "something else")


def to_rows(spec: InputSpec, flat: list[Any], shape: tuple[int, ...]) -> Array | None:
    """`flat` as an array of `spec`'s element type and of `shape`; None where an element is none of that
    type."""
    dtype = spec.dtype
    if spec.datatype == _BF16 or not _TAKEN[dtype.kind].issuperset(set(map(type, flat))):
        return None
    if spec.text:
        texts = np.empty(len(flat), object)
        texts[:] = [value.encode() for value in flat]
        return texts.reshape(shape)
    try:
        array = np.array(flat, np.float64 if dtype.kind == "f" else dtype)
    except OverflowError:
        return None
    if dtype.kind == "f" and dtype != np.float64:
        with np.errstate(over="ignore"):
            narrow = array.astype(dtype)
        finite = np.isfinite(narrow)
        if not finite.all() and np.isfinite(array[~finite]).any():  # the number was too large
            return None
        array = narrow
    return array.reshape(shape)


def wrong_value(spec: InputSpec, value: Any) -> tuple[list[int], str] | None:
    """Where in `value`, one row of `spec`, the first wrong element is, and what is wrong with it."""
    if spec.datatype == _BF16:
        return [], "cannot be given as JSON: the model takes BF16"
    found = _wrong(spec, value, list(spec.shape), 0)
    return (found[0][::-1], found[1]) if found is not None else None


def shape_of(spec: InputSpec, value: Any) -> tuple[int, ...]:
    """The shape of one checked row."""
    sizes = []
    for _ in spec.shape:
        sizes.append(len(value))
        value = value[0]
    return tuple(sizes)


def _wrong(spec: InputSpec, value: Any, sizes: list[int], axis: int) -> tuple[list[int], str] | None:
    """Indices innermost first. The first list of an open axis decides its size for the others."""
    if axis == len(sizes):
        reason = wrong_element(spec, value)
        return ([], reason) if reason else None
    if not isinstance(value, list):
        return [], f"must be a list, not {json_name(value)}"
    if not value:
        return [], "is empty"
    if sizes[axis] not in (-1, len(value)):
        return [], f"has {len(value)} elements where {sizes[axis]} are expected"
    if axis + 1 < len(sizes) or to_rows(spec, value, (len(value),)) is None:
        for index, item in enumerate(value):
            found = _wrong(spec, item, sizes, axis + 1)
            if found is not None:
                found[0].append(index)
                return found
    sizes[axis] = len(value)
    return None


def wrong_element(spec: InputSpec, value: Any) -> str | None:
    """What keeps `value` from being one element of `spec`; None where nothing does."""
    kind, named = spec.dtype.kind, json_name(value)
    if spec.text:
        return None if isinstance(value, str) else f"must be a string, not {named}"
    if spec.datatype == _BOOL:
        return None if isinstance(value, bool) else f"must be true or false, not {named}"
    if kind in "iu":
        return _wrong_integer(spec, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"must be a number, not {named}"
    try:
        struct.pack("<e" if spec.dtype.itemsize == 2 else "<f" if spec.dtype.itemsize == 4 else "<d", value)
    except (OverflowError, struct.error):
        return f"is outside the range of {spec.type_name}"
    return None


def _wrong_integer(spec: InputSpec, value: Any) -> str | None:
    if isinstance(value, float):
        return f"must be a whole number for {spec.type_name}"
    if isinstance(value, bool) or not isinstance(value, int):
        return f"must be a whole number, not {json_name(value)}"
    limits = np.iinfo(spec.dtype.name)
    if not limits.min <= value <= limits.max:
        return f"is outside {limits.min} … {limits.max} of {spec.type_name}"
    return None
