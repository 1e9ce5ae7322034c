"""Rows of an Arrow table (Parquet, Arrow, CSV): column by column, without a look at any single row.

An input is given by a column of its own name (numbers, or lists for a row of several elements), by one column
for each of its column names, or, where the model names no columns and is given as many, by their order. What
is wrong with a column fails the job, naming the column; what is wrong with a value (null, out of range) fails
its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from headrace.v1.tensor_pb2 import DataType
from numpy.typing import NDArray

from services.common.errors import HeadraceError, InvalidArgument
from services.worker.batch.json_rows import CUSTOM_ID, rows_of_values
from services.worker.batch.rows import Group, Inputs, InputSpec, Rows, without
from services.worker.tensors import Array

# Rows that are turned from columns to rows at a time: both sides stay in the processor's cache.
_BLOCK = 2048

# What pyarrow raises for a value that it cannot turn into one of Python's; bad UTF-8 is a ValueError.
_NO_VALUE = (pa.ArrowException, ValueError, OverflowError)

_TAKEN = {"O": "a string", "b": "true or false"}

Mask = NDArray[np.bool_]


def wanted_columns(names: Sequence[str], inputs: Inputs) -> dict[str, list[str]]:
    """Which columns of a table give which input. Raises InvalidArgument naming the column that is missing or
    that the model does not know."""
    given = {name for name in names if name != CUSTOM_ID} | ({CUSTOM_ID} & set(_all_names(inputs)))
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise InvalidArgument(f"The input has two columns {twice}.", field=f"inputs.{twice}")
    chosen: dict[str, list[str]] = {}
    for spec in inputs.specs:
        if spec.name in given:
            chosen[spec.name] = [spec.name]
        elif spec.tabular:
            chosen[spec.name] = list(spec.columns)
        elif len(inputs.specs) == 1 and not spec.columns and spec.shape == (len(given),):
            chosen[spec.name] = [name for name in names if name in given]
        else:
            raise _missing(spec.name)
    known = [name for columns in chosen.values() for name in columns]
    for name in names:
        if name in given and name not in known:
            where = f"inputs.{name[:64]}"
            raise InvalidArgument(
                f"{where} is no input of this model, which takes {inputs.listed}.", field=where
            )
    for name in known:
        if name not in given:
            raise _missing(name)
    return chosen


def rows_of_table(table: pa.Table, inputs: Inputs, first_row: int) -> Rows:
    """All rows of `table`, the first of which is row `first_row` of the job. Raises InvalidArgument with the
    field where a column cannot be what the model takes."""
    chosen = wanted_columns(table.column_names, inputs)
    custom_ids = _custom_ids(table, inputs)
    if not inputs.batched or any(-1 in spec.shape for spec in inputs.specs):
        wrong: dict[int, HeadraceError] = {}
        values = _python_rows(
            table.select([name for names in chosen.values() for name in names]), first_row, wrong
        )
        found = rows_of_values(values, inputs, first_row, wrong)
        return Rows(found.count, found.groups, found.failures, custom_ids)
    count = table.num_rows
    failures: dict[int, HeadraceError] = {}
    arrays: dict[str, Array] = {}
    for spec in inputs.specs:
        names = chosen[spec.name]
        columns = [table.column(name) for name in names]
        if spec.shape and len(names) == 1 and _is_list(columns[0].type):
            arrays[spec.name] = _of_lists(spec, columns[0], first_row, failures)
        elif prod(spec.shape) == len(names):
            parts = [
                _of_values(spec, name, column, first_row, failures)
                for name, column in zip(names, columns, strict=True)
            ]
            arrays[spec.name] = _beside(parts).reshape(count, *spec.shape)
        else:
            where = f"inputs.{names[0]}"
            raise InvalidArgument(f"{where} must hold lists, not {columns[0].type}.", field=where)
    places = without(count, failures)
    if failures:
        arrays = {name: array[places] for name, array in arrays.items()}
    groups = [Group(places, arrays)] if len(places) else []
    return Rows(count, groups, failures, custom_ids)


def _all_names(inputs: Inputs) -> list[str]:
    return [name for spec in inputs.specs for name in (spec.name, *spec.columns)]


def _missing(name: str) -> InvalidArgument:
    where = f"inputs.{name}"
    return InvalidArgument(f"{where} is missing: the input has no such column.", field=where)


def _custom_ids(table: pa.Table, inputs: Inputs) -> list[str | None] | None:
    if CUSTOM_ID not in table.column_names or CUSTOM_ID in _all_names(inputs):
        return None
    where = f"inputs.{CUSTOM_ID}"
    try:
        ids: list[str | None] = table.column(CUSTOM_ID).cast(pa.string()).to_pylist()
    except UnicodeDecodeError:
        raise InvalidArgument(f"{where} holds a string that is not UTF-8.", field=where) from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        kind = table.column(CUSTOM_ID).type
        raise InvalidArgument(f"{where} must hold strings, not {kind}.", field=where) from None
    return ids


def _python_rows(
    table: pa.Table, first_row: int, failures: dict[int, HeadraceError]
) -> list[dict[str, Any] | None]:
    """What JSON rows would be; a value that Python cannot hold (a string of invalid UTF-8, a time past all
    calendars) fails its row."""
    with suppress(*_NO_VALUE):
        return list(table.to_pylist())
    found: list[dict[str, Any] | None] = [{} for _ in range(table.num_rows)]
    for name, column in zip(table.column_names, table.columns, strict=True):
        for place, value in enumerate(column):
            row = found[place]
            if row is None:
                continue
            try:
                row[name] = value.as_py()
            except _NO_VALUE as error:
                at = f"inputs[{first_row + place}].{name}"
                failures[place] = InvalidArgument(f"{at} cannot be read: {error}.", field=at)
                found[place] = None
    return found


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _beside(parts: list[Array]) -> Array:
    """Columns as the rows of one matrix."""
    if len(parts) == 1:
        return parts[0]
    rows = len(parts[0])
    matrix = np.empty((rows, len(parts)), parts[0].dtype)
    for first in range(0, rows, _BLOCK):
        block = matrix[first : first + _BLOCK]
        for position, part in enumerate(parts):
            block[:, position] = part[first : first + _BLOCK]
    return matrix


def _of_lists(
    spec: InputSpec, column: pa.ChunkedArray, first_row: int, failures: dict[int, HeadraceError]
) -> Array:
    """A column whose rows are lists of a fixed shape."""
    where = f"inputs.{spec.name}"
    array = _combined(column)
    # All of the type before any value: pyarrow cannot pick rows of every type, nor of lists of nulls.
    kind = array.type
    for _ in spec.shape:
        if not _is_list(kind):
            raise InvalidArgument(f"{where} must hold lists of shape {list(spec.shape)}.", field=where)
        kind = kind.value_type
    _check_type(spec, where, kind)
    per_row = 1
    for size in spec.shape:
        lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)
        wrong = lengths != size
        if wrong.any():
            of_rows = wrong.reshape(-1, per_row)
            for place in np.flatnonzero(of_rows.any(axis=1)).tolist():
                at = f"inputs[{first_row + place}].{spec.name}"
                length = int(lengths.reshape(-1, per_row)[place][of_rows[place]][0])
                reason = "must be a list, not null" if length < 0 else f"has {length} elements"
                failures.setdefault(
                    place, InvalidArgument(f"{at} {reason} where {size} are expected.", field=at)
                )
            # Rows that failed give nulls for all of their elements, so that all others keep their place.
            array = _refilled(array, wrong, size)
        else:
            array = array.flatten()
        per_row *= size
    flat = _typed(spec, spec.name, array, failures, lambda element: element // per_row, first_row)
    return flat.reshape(len(column), *spec.shape)


def _refilled(array: pa.Array, wrong: Mask, size: int) -> pa.Array:
    """The elements of the lists of `array`, and `size` nulls for each that is wrong."""
    missing = np.repeat(wrong, size)
    order = np.cumsum(~missing) - 1
    return array.filter(pa.array(~wrong)).flatten().take(pa.array(order, mask=missing))


def _of_values(
    spec: InputSpec,
    name: str,
    column: pa.ChunkedArray,
    first_row: int,
    failures: dict[int, HeadraceError],
) -> Array:
    return _typed(spec, name, _combined(column), failures, lambda element: element, first_row)


def _typed(
    spec: InputSpec,
    name: str,
    array: pa.Array,
    failures: dict[int, HeadraceError],
    place_of: Callable[[int], int],
    first_row: int,
) -> Array:
    """`array` as numpy values of `spec`'s element type; elements that are none fail their row."""
    where = f"inputs.{name}"
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    if pa.types.is_null(array.type):
        array = array.cast(pa.string() if spec.text else pa.from_numpy_dtype(spec.dtype))
    _check_type(spec, where, array.type)

    def fail(mask: Mask, reason: str) -> None:
        for element in np.flatnonzero(mask).tolist():
            place = place_of(element)
            at = f"inputs[{first_row + place}].{name}"
            failures.setdefault(place, InvalidArgument(f"{at} {reason}.", field=at))

    if array.null_count:
        taken = _TAKEN.get(spec.dtype.kind, "a number")
        fail(array.is_null().to_numpy(zero_copy_only=False), f"must be {taken}, not null")
        array = pc.fill_null(array, "" if spec.text else pa.scalar(0, pa.uint8()).cast(array.type))
    if spec.text:
        texts = np.empty(len(array), object)
        # Not by way of str: Parquet's strings may be anything, and what is no text fails in its row's run.
        texts[:] = array.cast(pa.large_binary()).to_pylist()
        return texts
    values: Array = array.to_numpy(zero_copy_only=False)
    return _narrowed(spec, values, fail)


def _narrowed(spec: InputSpec, values: Array, fail: Callable[[Mask, str], None]) -> Array:
    dtype = spec.dtype
    if values.dtype == dtype:
        return values
    if dtype.kind in "iu":
        limits = np.iinfo(dtype.name)
        # Compared as Python numbers would be: unsigned and signed of 64 bits share no type.
        low = values < limits.min if values.dtype.kind == "i" else np.zeros(len(values), bool)
        high = values > limits.max if np.iinfo(values.dtype).max > limits.max else np.zeros(len(values), bool)
        if (low | high).any():
            fail(low | high, f"is outside {limits.min} … {limits.max} of {spec.type_name}")
        return values.astype(dtype)
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    if dtype.kind == "f" and dtype.itemsize < 8:
        too_large = np.isinf(narrow) & np.isfinite(values.astype(np.float64, copy=False))
        if too_large.any():
            fail(too_large, f"is outside the range of {spec.type_name}")
    return narrow


def _check_type(spec: InputSpec, where: str, kind: pa.DataType) -> None:
    """Raises InvalidArgument where no value of `kind` can be an element of `spec`."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_decimal(kind):
        kind = pa.float64()
    if not pa.types.is_null(kind) and not _fits(spec, kind):
        raise InvalidArgument(f"{where} holds {kind}, the model takes {spec.type_name}.", field=where)


def _fits(spec: InputSpec, kind: pa.DataType) -> bool:
    if spec.datatype == DataType.DATA_TYPE_BF16:
        return False
    if spec.text:
        return bool(
            pa.types.is_string(kind) or pa.types.is_large_string(kind)
            or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        )  # fmt: skip
    if spec.dtype.kind == "b":
        return bool(pa.types.is_boolean(kind))
    if spec.dtype.kind == "f":
        return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
    return bool(pa.types.is_integer(kind))


def _combined(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
