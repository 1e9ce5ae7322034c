"""The forms that native inputs may have, turned into the tensors of a signature.

    [[1.0, 2.0], [3.0, 4.0]]                      rows of the model's one input
    {"age": [30, 40], "income": [1e3, 2e3]}       named columns
    [{"age": 30, "income": 1e3}, …]               row objects
    {"x": [[1.0, 2.0]]}                           named tensors
    [{"name": "x", "data": [[1.0, 2.0]]}, …]      tensors as in the Open Inference Protocol

Every error names its element: `inputs[3][7]`, `inputs.x`, `inputs.mean radius[5]`, `inputs[2].age`.
"""

from __future__ import annotations

from itertools import chain
from operator import itemgetter
from typing import Any

import msgspec
from headrace.v1.tensor_pb2 import Tensor

from services.common.errors import InvalidArgument
from services.gateway.codecs.explain import explain, explain_flat, json_name, wrong_element
from services.gateway.codecs.tensors import (
    PARSE_ERRORS,
    malformed,
    parse_any,
    tensor_from_column,
    tensor_from_flat,
    tensor_from_json,
    tensor_of,
    tensor_of_rows,
)
from services.gateway.signature import InputSpec, ModelSignature

_LIST, _OBJECT = b"["[0], b"{"[0]
_SPACE = b" \t\r\n"
_OBJECTS = frozenset({dict})
#: What an error repeats of a name that the client made up.
_MAX_NAME = 64

_members: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _NamedTensor(msgspec.Struct):
    name: str
    data: msgspec.Raw
    shape: list[int] | None = None
    datatype: str | None = None


_named_tensors: msgspec.json.Decoder[list[_NamedTensor]] = msgspec.json.Decoder(list[_NamedTensor])


def tensors_of_inputs(
    signature: ModelSignature, raw: msgspec.Raw | bytes, path: str = "inputs"
) -> list[Tensor]:
    """The tensors of `raw`, the JSON value at `path`, in the signature's order. Raises InvalidArgument naming
    the field, MalformedBody for what is not JSON."""
    view = memoryview(raw)
    if view[0] == _LIST:
        first = _after_bracket(view)
        if first == _OBJECT:
            return _from_objects(signature, raw, path)
        return [_one_input(signature, raw, first, path)]
    if view[0] == _OBJECT:
        return _from_members(signature, raw, path)
    raise InvalidArgument(
        f"{path} must be a list or an object, not {json_name(parse_any(raw, path))}.", field=path
    )


def tensors_of_input(signature: ModelSignature, raw: msgspec.Raw | bytes) -> list[Tensor]:
    """The same for `input`, a single row without the list around it. Where it is a list as deep as the whole
    tensor, it is taken as one."""
    raw = bytes(raw)
    spec = signature.inputs[0]
    if not signature.batched or (len(signature.inputs) == 1 and _depth(raw) == len(spec.shape)):
        return tensors_of_inputs(signature, raw, "input")
    try:
        return tensors_of_inputs(signature, b"[" + raw + b"]", "input")
    except InvalidArgument as error:
        if error.field is None or not error.field.startswith("input[0]"):
            raise
        # The caller sent the row alone, so its path has no row index.
        field = "input" + error.field.removeprefix("input[0]")
        message = error.message.replace("input[0]", "input")
        raise type(error)(message, field=field) from None


def _depth(raw: bytes) -> int:
    """How many lists open at the start."""
    depth = 0
    for byte in raw:
        if byte == _LIST:
            depth += 1
        elif byte not in _SPACE:
            break
    return depth


def _after_bracket(view: memoryview) -> int:
    at = 1
    while view[at] in _SPACE:  # the value is whole, so something follows
        at += 1
    return view[at]


def _one_input(signature: ModelSignature, raw: msgspec.Raw | bytes, first: int, path: str) -> Tensor:
    if len(signature.inputs) > 1:
        names = ", ".join(spec.name for spec in signature.inputs)
        raise InvalidArgument(f"{path} must name the model's inputs: {names}.", field=path)
    return _listed(signature.inputs[0], raw, first, path)


def _listed(spec: InputSpec, raw: msgspec.Raw | bytes, first: int, path: str) -> Tensor:
    """A list for one input: its nested lists, or a plain column where each row is one element."""
    if first not in (_LIST, b"]"[0]) and spec.scalar_rows and len(spec.shape) == 2:
        return tensor_from_column(spec, raw, path)
    return tensor_from_json(spec, raw, path)


def _from_members(signature: ModelSignature, raw: msgspec.Raw | bytes, path: str) -> list[Tensor]:
    try:
        members = _members.decode(raw)
    except PARSE_ERRORS as error:
        raise malformed(error) from None
    if not members:
        raise InvalidArgument(f"{path} is empty.", field=path)
    columns = _columns(signature)
    if columns and signature.by_name.keys().isdisjoint(members):
        return _from_columns(signature, members, path)
    tensors = []
    for name in members:
        if name not in signature.by_name:
            raise _unknown(signature, name, path)
    for spec in signature.inputs:
        where = f"{path}.{spec.name}"
        if spec.name not in members:
            raise InvalidArgument(f"{where} is missing.", field=where)
        member = members[spec.name]
        view = memoryview(member)
        if view[0] == _LIST:
            tensors.append(_listed(spec, member, _after_bracket(view), where))
        else:
            tensors.append(tensor_from_json(spec, member, where))
    _same_rows(signature, tensors, path)
    return tensors


def _from_columns(signature: ModelSignature, members: dict[str, msgspec.Raw], path: str) -> list[Tensor]:
    """Named columns of the model's tabular input."""
    spec = signature.inputs[0]
    try:
        columns = [spec.flat_decoder.decode(members[name]) for name in spec.columns]
    except (KeyError, *PARSE_ERRORS):
        columns = []
    lengths = set(map(len, columns))
    if len(columns) == len(members) and len(lengths) == 1 and 0 not in lengths:
        flat = list(chain.from_iterable(zip(*columns, strict=True)))
        tensor = tensor_of_rows(spec, flat, len(columns[0]))
        if tensor is not None:
            return [tensor]
    raise _wrong_columns(signature, members, path)


def _wrong_columns(signature: ModelSignature, members: dict[str, msgspec.Raw], path: str) -> InvalidArgument:
    """What is wrong with `members`, which are no columns of the model."""
    spec = signature.inputs[0]
    taken = frozenset(spec.columns)
    for name in members:
        if name not in taken:
            return _unknown(signature, name, path)
    rows = -1
    for name in spec.columns:
        where = f"{path}.{name}"
        if name not in members:
            return InvalidArgument(f"{where} is missing.", field=where)
        column = parse_any(members[name], where)
        if not isinstance(column, list):
            return InvalidArgument(f"{where} must be a list, not {json_name(column)}.", field=where)
        if rows not in (-1, len(column)):
            return InvalidArgument(
                f"{where} has {len(column)} elements, the columns before {rows}.", field=where
            )
        rows = len(column)
        if column:
            explain_flat(spec, column, where)
    if rows == 0:
        return InvalidArgument(f"{path} is empty.", field=path)
    return InvalidArgument(f"{path} has {rows} rows where {spec.shape[0]} are expected.", field=path)


def _from_objects(signature: ModelSignature, raw: msgspec.Raw | bytes, path: str) -> list[Tensor]:
    rows = parse_any(raw, path)
    head = rows[0]
    if "name" in head and "data" in head and "name" not in _columns(signature):
        return _from_named_tensors(signature, raw, path)
    known = frozenset((*signature.by_name, *_columns(signature)))
    if signature.batched and _OBJECTS.issuperset(map(type, rows)) and all(map(known.issuperset, rows)):
        tensors = []
        for spec in signature.inputs:
            tensor = _of_row_objects(spec, rows)
            if tensor is None:
                break
            tensors.append(tensor)
        else:
            return tensors
    raise _wrong_objects(signature, known, rows, path)


def _by_column(spec: InputSpec, head: dict[str, Any]) -> bool:
    """Whether row objects that begin with `head` have a member for every column of `spec`."""
    return _is_tabular(spec) and spec.name not in head


def _of_row_objects(spec: InputSpec, rows: list[dict[str, Any]]) -> Tensor | None:
    try:
        if _by_column(spec, rows[0]):
            chosen: Any = map(itemgetter(*spec.columns), rows)
            flat = list(chosen if len(spec.columns) == 1 else chain.from_iterable(chosen))
            return tensor_of_rows(spec, flat, len(rows))
        return tensor_of(spec, [_row(spec, row[spec.name]) for row in rows])
    except KeyError:
        return None


def _row(spec: InputSpec, value: Any) -> Any:
    """A row of one element may be given without the list around it."""
    return [value] if type(value) is not list and spec.scalar_rows and len(spec.shape) == 2 else value


def _wrong_objects(
    signature: ModelSignature, known: frozenset[str], rows: list[Any], path: str
) -> InvalidArgument:
    """What is wrong with `rows`, which are no row objects of the model."""
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            where = f"{path}[{index}]"
            return InvalidArgument(f"{where} must be an object, not {json_name(row)}.", field=where)
    if not signature.batched:
        return InvalidArgument(f"{path} must be tensors: this model does not take rows.", field=path)
    for index, row in enumerate(rows):
        if not known.issuperset(row):
            name = next(name for name in row if name not in known)
            return _unknown(signature, name, f"{path}[{index}]")
    for spec in signature.inputs:
        by_column = _by_column(spec, rows[0])
        for index, row in enumerate(rows):
            for name in spec.columns if by_column else (spec.name,):
                reason = _wrong_member(spec, row, name, by_column=by_column)
                if reason is not None:
                    where = f"{path}[{index}].{name}"
                    return InvalidArgument(f"{where} {reason}.", field=where)
        if not by_column:
            explain(spec, [_row(spec, row[spec.name]) for row in rows], spec.shape, path)
    return InvalidArgument(f"{path} are not the rows that this model takes.", field=path)


def _wrong_member(spec: InputSpec, row: dict[str, Any], name: str, *, by_column: bool) -> str | None:
    if name not in row:
        return "is missing"
    value = row[name]
    if by_column or (spec.scalar_rows and len(spec.shape) == 2 and not isinstance(value, list)):
        return wrong_element(spec.datatype, value)
    return None


def _from_named_tensors(signature: ModelSignature, raw: msgspec.Raw | bytes, path: str) -> list[Tensor]:
    try:
        given = _named_tensors.decode(raw)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"{path} is not a list of named tensors: {error}.", field=path) from None
    found: dict[str, Tensor] = {}
    for index, one in enumerate(given):
        where = f"{path}[{index}]"
        spec = signature.by_name.get(one.name)
        if spec is None:
            raise _unknown(signature, one.name, path)
        if one.name in found:
            raise InvalidArgument(f"{where}.name: {one.name} is given twice.", field=f"{where}.name")
        if one.datatype is not None and one.datatype != spec.datatype.name:
            raise InvalidArgument(
                f"{where}.datatype is {one.datatype} where the model takes {spec.datatype.name}.",
                field=f"{where}.datatype",
            )
        found[one.name] = tensor_from_nested_or_flat(spec, one.data, one.shape, where)
    for spec in signature.inputs:
        if spec.name not in found:
            raise InvalidArgument(f"{path}.{spec.name} is missing.", field=f"{path}.{spec.name}")
    tensors = [found[spec.name] for spec in signature.inputs]
    _same_rows(signature, tensors, path)
    return tensors


def tensor_from_nested_or_flat(
    spec: InputSpec, raw: msgspec.Raw | bytes, shape: list[int] | None, path: str
) -> Tensor:
    """`data` of the Open Inference Protocol: nested, or flat where `shape` says how to fold it."""
    view = memoryview(raw)
    nested = view[0] != _LIST or _after_bracket(view) == _LIST
    if shape is None or (nested and len(shape) > 1):
        tensor = tensor_from_json(spec, raw, f"{path}.data")
        if shape is not None and list(tensor.shape) != shape:
            raise InvalidArgument(
                f"{path}.shape is {shape} but data has {list(tensor.shape)}.", field=f"{path}.shape"
            )
        return tensor
    check_shape(spec, shape, f"{path}.shape")
    return tensor_from_flat(spec, raw, tuple(shape), f"{path}.data")


def check_shape(spec: InputSpec, shape: list[int], path: str) -> None:
    """Raise InvalidArgument where `shape` is not one that the signature allows."""
    fits = len(shape) == len(spec.shape) and all(
        0 < size < 1 << 31 and wanted in (-1, size) for size, wanted in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise InvalidArgument(f"{path} is {shape} where the model takes {list(spec.shape)}.", field=path)


def _is_tabular(spec: InputSpec) -> bool:
    return spec.batched and spec.shape[1:] == (len(spec.columns),)


def _columns(signature: ModelSignature) -> tuple[str, ...]:
    """Column names that stand for an input without naming it: those of a model with one tabular input."""
    if len(signature.inputs) == 1 and _is_tabular(signature.inputs[0]):
        return signature.inputs[0].columns
    return ()


def _unknown(signature: ModelSignature, name: str, path: str) -> InvalidArgument:
    names = _columns(signature) or tuple(signature.by_name)
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    where = f"{path}.{name[:_MAX_NAME]}"
    return InvalidArgument(f"{where} is no input of this model, which takes {listed}.", field=where)


def _same_rows(signature: ModelSignature, tensors: list[Tensor], path: str) -> None:
    if not signature.batched:
        return
    rows = tensors[0].shape[0]
    for tensor in tensors[1:]:
        if tensor.shape[0] != rows:
            raise InvalidArgument(
                f"{path}.{tensor.name} has {tensor.shape[0]} rows, {tensors[0].name} has {rows}.",
                field=f"{path}.{tensor.name}",
            )
