"""Rows written as JSON: an object of input names, an object of column names, or the bare value of the only
input. The rules and the sentences are those of the gateway's native `inputs`; a row that breaks them fails
alone, and its field is named as if all rows of the job were one list: `inputs[17].age`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import msgspec
import numpy as np

from services.common.errors import HeadraceError, InvalidArgument
from services.worker.batch.json_values import json_name, shape_of, to_rows, wrong_value
from services.worker.batch.rows import Group, Inputs, InputSpec, Rows
from services.worker.tensors import Array

CUSTOM_ID = "custom_id"
_MAX_NAME = 64
# JSON's white space, by which the gateway counts the rows. To Python a form feed is blank, too.
_BLANKS = b" \t\r\n"
# What the decoder raises: text that is no JSON, bytes that are no text, lists deeper than it goes.
_PARSE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_decoder = msgspec.json.Decoder()


def lines_of(text: bytes) -> list[bytes]:
    """The rows of a text; lines that hold nothing are none."""
    return [line for line in text.split(b"\n") if line and line.strip(_BLANKS)]


def rows_of_lines(lines: Sequence[bytes], inputs: Inputs, first_row: int) -> Rows:
    """One row per line. `first_row` is the position of the first in the job."""
    failures: dict[int, HeadraceError] = {}
    values: list[Any]
    try:
        values = _decoder.decode_lines(b"\n".join(lines))
        if len(values) != len(lines):
            raise msgspec.DecodeError
    except _PARSE_ERRORS:
        values = []
        for place, line in enumerate(lines):
            try:
                values.append(_decoder.decode(line))
            except _PARSE_ERRORS as error:
                where = f"inputs[{first_row + place}]"
                failures[place] = InvalidArgument(f"{where} is not JSON: {error}.", field=where)
                values.append(None)
    return rows_of_values(values, inputs, first_row, failures)


def rows_of_values(
    values: Sequence[Any], inputs: Inputs, first_row: int, failures: Mapping[int, HeadraceError] | None = None
) -> Rows:
    """The same for decoded values; those in `failures` are wrong already."""
    failed = dict(failures or {})
    custom_ids = _custom_ids(values, inputs, first_row, failed)
    simple = None if failed else _tabular(values, inputs, with_ids=custom_ids is not None)
    if simple is not None:
        places = np.arange(len(values), dtype=np.int64)
        return Rows(len(values), [Group(places, {inputs.specs[0].name: simple})], {}, custom_ids)
    by_place: dict[int, list[Any]] = {}
    for place, value in enumerate(values):
        if place not in failed:
            try:
                by_place[place] = _row(value, inputs, f"inputs[{first_row + place}]")
            except InvalidArgument as error:
                failed[place] = error
    groups = list(_grouped(by_place, inputs))
    return Rows(len(values), groups, failed, custom_ids)


def _custom_ids(
    values: Sequence[Any], inputs: Inputs, first_row: int, failed: dict[int, HeadraceError]
) -> list[str | None] | None:
    """The rows' own ids, where the model does not take an input of that name itself."""
    if CUSTOM_ID in inputs.columns or any(spec.name == CUSTOM_ID for spec in inputs.specs):
        return None
    found = [value.get(CUSTOM_ID) if type(value) is dict else None for value in values]
    if not any(given is not None for given in found):
        return None
    for place, given in enumerate(found):
        if type(given) is int:
            found[place] = str(given)
        elif given is not None and type(given) is not str:
            where = f"inputs[{first_row + place}].{CUSTOM_ID}"
            reason = f"{where} must be a string, not {json_name(given)}."
            failed.setdefault(place, InvalidArgument(reason, field=where))
            found[place] = None
    return found


def _tabular(values: Sequence[Any], inputs: Inputs, *, with_ids: bool) -> Array | None:
    """All rows at once, where each names every column of the only input and nothing else; None where not."""
    columns = inputs.columns
    if len(columns) < 2 or not inputs.batched:
        return None
    chosen = itemgetter(*columns)
    sizes = {len(columns), len(columns) + with_ids}
    try:
        if any(type(row) is not dict or len(row) not in sizes for row in values):
            return None
        if with_ids and any((len(row) > len(columns)) != (CUSTOM_ID in row) for row in values):
            return None
        flat = list(chain.from_iterable(map(chosen, values)))
    except KeyError:
        return None
    return to_rows(inputs.specs[0], flat, (len(values), len(columns)))


def _row(value: Any, inputs: Inputs, where: str) -> list[Any]:
    """The value of every input, each checked. Raises InvalidArgument."""
    specs = inputs.specs
    if type(value) is not dict:
        if len(specs) > 1:
            raise InvalidArgument(f"{where} must name the model's inputs: {inputs.listed}.", field=where)
        return [_checked(specs[0], _lifted(specs[0], value), where)]
    known = {spec.name for spec in specs}
    if inputs.columns and known.isdisjoint(value):
        known = set(inputs.columns)
    for name in value:
        if name not in known and name != CUSTOM_ID:
            at = f"{where}.{name[:_MAX_NAME]}"
            raise InvalidArgument(f"{at} is no input of this model, which takes {inputs.listed}.", field=at)
    if inputs.columns and specs[0].name not in value:
        return [_by_columns(specs[0], value, where)]
    row = []
    for spec in specs:
        at = f"{where}.{spec.name}"
        if spec.name not in value:
            raise InvalidArgument(f"{at} is missing.", field=at)
        row.append(_checked(spec, _lifted(spec, value[spec.name]), at))
    return row


def _by_columns(spec: InputSpec, value: Mapping[str, Any], where: str) -> list[Any]:
    scalar = InputSpec(spec.name, spec.datatype, ())
    row = []
    for name in spec.columns:
        at = f"{where}.{name}"
        if name not in value:
            raise InvalidArgument(f"{at} is missing.", field=at)
        row.append(_checked(scalar, value[name], at))
    return row


def _lifted(spec: InputSpec, value: Any) -> Any:
    """A row of one element may be given without the list around it."""
    return [value] if spec.shape in ((1,), (-1,)) and type(value) is not list else value


def _checked(spec: InputSpec, value: Any, where: str) -> Any:
    wrong = wrong_value(spec, value)
    if wrong is not None:
        indices, reason = wrong
        at = where + "".join(f"[{index}]" for index in indices)
        raise InvalidArgument(f"{at} {reason}.", field=at)
    return value


def _grouped(by_place: Mapping[int, list[Any]], inputs: Inputs) -> Iterator[Group]:
    """Rows of equal shapes together, in the order in which the shapes appear first."""
    if not inputs.batched:
        shapes: Mapping[Any, list[int]] = {place: [place] for place in by_place}
    elif any(-1 in spec.shape for spec in inputs.specs):
        found: dict[Any, list[int]] = defaultdict(list)
        for place, row in by_place.items():
            shape = tuple(shape_of(spec, value) for spec, value in zip(inputs.specs, row, strict=True))
            found[shape].append(place)
        shapes = found
    else:
        shapes = {(): list(by_place)} if by_place else {}
    for places in shapes.values():
        arrays = {}
        for position, spec in enumerate(inputs.specs):
            values = [by_place[place][position] for place in places]
            flat, sizes = values, [len(values)]
            for size in shape_of(spec, values[0]):
                flat = list(chain.from_iterable(flat))
                sizes.append(size)
            array = to_rows(spec, flat, tuple(sizes))
            if array is None:
                raise AssertionError("every value was checked")
            arrays[spec.name] = array
        yield Group(np.array(places, np.int64), arrays)
