"""Rows written as CSV (RFC 4180), without their header: whole columns at once, and where that does not work,
line by line, so that a row that is wrong fails alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.csv as pa_csv
from headrace.v1.tensor_pb2 import DataType

from services.common.errors import HeadraceError, InvalidArgument
from services.worker.batch.columns import rows_of_table, wanted_columns
from services.worker.batch.json_rows import CUSTOM_ID, rows_of_values
from services.worker.batch.rows import Inputs, InputSpec, Rows

_NULLS = ["", "null", "NULL"]
_TRUE, _FALSE = ["true", "True", "TRUE", "1"], ["false", "False", "FALSE", "0"]
_HEXADECIMAL = ("0x", "0X")
# A field may be as long as a line, which the gateway bounds.
_MAX_FIELD = 64 << 20


def rows_of_csv(text: bytes, columns: Sequence[str], inputs: Inputs, first_row: int) -> Rows:
    """One row per line of `text`, whose values are those of `columns`. Raises InvalidArgument with the field
    where the columns are not the model's."""
    chosen = wanted_columns(columns, inputs)
    specs = {name: spec for spec in inputs.specs for name in chosen[spec.name]}
    scalar = {name: not spec.shape or spec.tabular or spec.shape == (1,) for name, spec in specs.items()}
    if inputs.batched and all(scalar.values()):
        try:
            table = _read(text, columns, {name: _arrow_type(spec) for name, spec in specs.items()})
        except (pa.ArrowInvalid, pa.ArrowKeyError):
            pass  # the rows say which of them it is
        else:
            return rows_of_table(table, inputs, first_row)
    if inputs.batched:  # a text is itself, as it is above, whatever it looks like
        specs = {name: spec for name, spec in specs.items() if not (spec.text and scalar[name])}
    return _by_line(text, columns, specs, inputs, first_row)


def _read(text: bytes, columns: Sequence[str], types: dict[str, pa.DataType]) -> pa.Table:
    return pa_csv.read_csv(
        io.BytesIO(text),
        pa_csv.ReadOptions(column_names=list(columns), use_threads=False, block_size=len(text) + 1),
        pa_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=True),
        pa_csv.ConvertOptions(
            column_types={**types, **({} if CUSTOM_ID in types else {CUSTOM_ID: pa.string()})},
            null_values=_NULLS,
            true_values=_TRUE,
            false_values=_FALSE,
            strings_can_be_null=False,
        ),
    )


def _arrow_type(spec: InputSpec) -> pa.DataType:
    if spec.text:
        return pa.string()
    if spec.datatype == DataType.DATA_TYPE_BOOL:
        return pa.bool_()
    # Wider than the model's where there is such a type: what does not fit fails its row.
    return {"f": pa.float64(), "i": pa.int64(), "u": pa.uint64()}[spec.dtype.kind]


def _by_line(
    text: bytes, columns: Sequence[str], specs: dict[str, InputSpec], inputs: Inputs, first_row: int
) -> Rows:
    """`specs` by the columns whose cells stand for something else than their text."""
    values: list[Any] = []
    failures: dict[int, HeadraceError] = {}
    csv.field_size_limit(_MAX_FIELD)
    for record in csv.reader(io.StringIO(text.decode(errors="surrogateescape"), newline="")):
        if not record:
            continue
        place = len(values)
        wrong = _wrong_line(record, len(columns))
        if wrong is not None:
            where = f"inputs[{first_row + place}]"
            failures[place] = InvalidArgument(f"{where} {wrong}.", field=where)
            values.append(None)
            continue
        values.append(
            {
                name: _value(specs[name], given) if name in specs else given
                for name, given in zip(columns, record, strict=True)
            }
        )
    return rows_of_values(values, inputs, first_row, failures)


def _wrong_line(record: Sequence[str], columns: int) -> str | None:
    """What is wrong with a line as a whole; None where nothing is."""
    if len(record) != columns:
        return f"has {len(record)} values where {columns} columns are named"
    try:
        "".join(record).encode()
    except UnicodeEncodeError:  # bytes that are no text stand in it as surrogates
        return "is not UTF-8"
    return None


def _value(spec: InputSpec, given: str) -> Any:
    """What the text of a cell stands for; itself where it is nothing that the model takes."""
    if given.startswith("["):
        try:
            return msgspec.json.decode(given)
        except (msgspec.DecodeError, RecursionError):
            return given
    if spec.text:
        return given
    if given in _NULLS:
        return None
    if spec.datatype == DataType.DATA_TYPE_BOOL:
        return True if given in _TRUE else False if given in _FALSE else given
    try:
        return _number(spec, given)
    except ValueError:
        return given


def _number(spec: InputSpec, given: str) -> float | int:
    """As pyarrow reads it, which reads all lines where none is wrong. Raises ValueError."""
    if "_" in given:  # Python reads over them: 2024_01_02 would be a number
        raise ValueError(given)
    if spec.dtype.kind == "f":
        return float(given)
    if given.lstrip()[:2] not in _HEXADECIMAL:
        return int(given)
    bits = int(given, 16)  # sixteen digits are all 64 of them, with the sign where the model's has one
    return bits - (1 << 64) if spec.dtype.kind == "i" and bits >> 63 == 1 else bits
