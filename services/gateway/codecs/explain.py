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
_TAKEN: dict[type, frozenset[type]] = {
    bool: frozenset({bool}),
    int: frozenset({int}),
    float: frozenset({int, float}),
    str: frozenset({str}),
}


def json_name(value: Any) -> str:
    """What JSON calls `value`."""
    return "null" if value is None else _JSON_NAMES.get(type(value), "something else")


def right_types(datatype: Datatype, flat: list[Any]) -> bool:
    """Whether every element of `flat` is of a JSON type that `datatype` takes; ranges are not looked at."""
    return _TAKEN[datatype.python].issuperset(map(type, flat))


def explain(spec: InputSpec, value: Any, shape: tuple[int, ...], path: str) -> None:
    """Raise InvalidArgument for the first element of `value` that keeps it from being a tensor of `spec`'s
    element type and of `shape` (-1: any size, the same everywhere). Return where there is none."""
    if spec.datatype is BF16:
        raise InvalidArgument(f"{path}: BF16 is taken as raw bytes only.", field=path)
    found = _first_wrong(spec.datatype, value, list(shape), 0)
    if found is not None:
        indices, reason = found
        where = path + "".join(f"[{index}]" for index in reversed(indices))
        raise InvalidArgument(f"{where} {reason}.", field=where)


def explain_flat(spec: InputSpec, value: Any, path: str) -> None:
    """The same for a flat list."""
    explain(spec, value, (-1,), path)


def _first_wrong(datatype: Datatype, value: Any, sizes: list[int], axis: int) -> tuple[list[int], str] | None:
    """The indices of the first wrong element, innermost first, and what is wrong with it. `sizes` is narrowed
    while walking: the first list of an axis decides a variable size for the others."""
    if axis == len(sizes):
        reason = wrong_element(datatype, value)
        return ([], reason) if reason else None
    if not isinstance(value, list):
        return [], f"must be a list, not {json_name(value)}"
    if not value:
        return [], "is empty"
    wanted = sizes[axis]
    if wanted not in (-1, len(value)):
        return [], f"has {len(value)} elements where {wanted} are expected"
    if axis + 1 == len(sizes):
        if not _fit(datatype, value):
            index = _first_unfit(datatype, value)
            return [index], wrong_element(datatype, value[index]) or "is out of place"
    else:
        for index, item in enumerate(value):
            found = _first_wrong(datatype, item, sizes, axis + 1)
            if found is not None:
                found[0].append(index)
                return found
    # Only now: an element of the wrong type says more than the lengths that follow from it.
    sizes[axis] = len(value)
    return None


def _fit(datatype: Datatype, flat: list[Any]) -> bool:
    """Whether no element of `flat` is wrong, a list at a time: one by one takes fifty times as long."""
    if not right_types(datatype, flat):
        return False
    if datatype is BYTES:
        return True
    try:
        struct.pack(f"<{len(flat)}{datatype.code}", *flat)
    except (OverflowError, struct.error):
        return False
    return True


def _first_unfit(datatype: Datatype, flat: list[Any]) -> int:
    """The index of the first wrong element of `flat`, which has one: by halves."""
    low, high = 0, len(flat)
    while high - low > 1:
        middle = (low + high) // 2
        if _fit(datatype, flat[low:middle]):
            low = middle
        else:
            high = middle
    return low


def wrong_element(datatype: Datatype, value: Any) -> str | None:
    """What keeps `value` from being one element of `datatype`; None where nothing does."""
    if datatype is BYTES:
        return None if isinstance(value, str) else f"must be a string, not {json_name(value)}"
    if datatype.python is bool:
        return None if isinstance(value, bool) else f"must be true or false, not {json_name(value)}"
    if datatype.python is int:
        return _wrong_integer(datatype, value)
    if value is None:
        return "must be a number, not null: missing values are sent as NaN in binary tensors"
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
