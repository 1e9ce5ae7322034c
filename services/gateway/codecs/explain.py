"""Why a JSON value is not the tensor that a signature asks for: the first wrong element, by its path."""

from __future__ import annotations

import struct
from typing import Any

from services.common.errors import InvalidArgument
from services.gateway.datatypes import BF16, BYTES, Datatype
from services.gateway.signature import InputSpec

_JSON_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def json_name(value: Any) -> str:
    """What JSON calls `value`."""
    return "null" if value is None else _JSON_NAMES.get(type(value), "something else")


def explain(spec: InputSpec, value: Any, shape: tuple[int, ...], path: str) -> None:
    """Raise InvalidArgument for the first element of `value` that keeps it from being a tensor of `spec`'s
    element type and of `shape` (-1: any size, the same everywhere). Return where there is none."""
    if spec.datatype is BF16:
        raise InvalidArgument(f"{path}: BF16 is taken as raw bytes only.", field=path)
    _walk(spec.datatype, value, list(shape), 0, path)


def explain_flat(spec: InputSpec, value: Any, path: str) -> None:
    """The same for a flat list."""
    explain(spec, value, (-1,), path)


def explain_element(datatype: Datatype, value: Any, path: str) -> None:
    """Raise InvalidArgument where `value` is not one element of `datatype`."""
    reason = _wrong_element(datatype, value)
    if reason:
        raise InvalidArgument(f"{path} {reason}.", field=path)


def _walk(datatype: Datatype, value: Any, sizes: list[int], axis: int, path: str) -> None:
    """`sizes` is narrowed while walking: the first list of an axis decides a variable size for the others."""
    if axis == len(sizes):
        explain_element(datatype, value, path)
        return
    if not isinstance(value, list):
        raise InvalidArgument(f"{path} must be a list, not {json_name(value)}.", field=path)
    if not value:
        raise InvalidArgument(f"{path} is empty.", field=path)
    wanted = sizes[axis]
    if wanted not in (-1, len(value)):
        raise InvalidArgument(f"{path} has {len(value)} elements where {wanted} are expected.", field=path)
    for index, item in enumerate(value):
        _walk(datatype, item, sizes, axis + 1, f"{path}[{index}]")
    # Only now: an element of the wrong type says more than the lengths that follow from it.
    sizes[axis] = len(value)


def _wrong_element(datatype: Datatype, value: Any) -> str | None:
    if datatype is BYTES:
        return None if isinstance(value, str) else f"must be a string, not {json_name(value)}"
    if datatype.python is bool:
        return None if isinstance(value, bool) else f"must be true or false, not {json_name(value)}"
    if datatype.python is int:
        return _wrong_integer(datatype, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"must be a number, not {json_name(value)}"
    try:
        struct.pack(f"<{datatype.code}", value)
    except (OverflowError, struct.error):
        return f"is outside the range of {datatype.name}"
    return None


def _wrong_integer(datatype: Datatype, value: Any) -> str | None:
    if isinstance(value, float):
        return f"must be a whole number for {datatype.name}"
    if isinstance(value, bool) or not isinstance(value, int):
        return f"must be a whole number, not {json_name(value)}"
    if not datatype.low <= value <= datatype.high:
        return f"is outside {datatype.low} … {datatype.high} of {datatype.name}"
    return None
