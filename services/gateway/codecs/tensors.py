"""Nested JSON lists to tensors, with the signature known before parsing.

The fast ways assume that the value is right: msgspec checks element types while it parses, struct checks
ranges and widths while it packs (9 ns an element; numpy takes 25 for a Python list). Only when one of them
objects does `explain` walk the value to name the element.
"""

from __future__ import annotations

import struct
from itertools import chain
from math import prod
from typing import Any

import msgspec
from headrace.v1.tensor_pb2 import Tensor

from services.common.errors import InvalidArgument, MalformedBody
from services.gateway.codecs.explain import explain, explain_flat, right_types
from services.gateway.codecs.numbers import LONG_BYTES, packed_numbers, packed_rows
from services.gateway.datatypes import BF16, BYTES, Datatype
from services.gateway.signature import InputSpec

PARSE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def malformed(error: Exception) -> MalformedBody:
    """What is said about bytes that are not JSON."""
    if isinstance(error, RecursionError):
        return MalformedBody("The body is nested too deeply.")
    if isinstance(error, UnicodeDecodeError):
        return MalformedBody("The body is not UTF-8.")
    detail = str(error).removeprefix("JSON is malformed: ")
    return MalformedBody(f"The body is not JSON: {detail}.")


_generic: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


def parse_any(raw: bytes | msgspec.Raw, path: str) -> Any:
    """Decode `raw`, the value of `path`, without expectations. Raises MalformedBody, InvalidArgument for a
    number that no computer has."""
    try:
        return _generic.decode(raw)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"{path}: {error}.", field=path) from None
    except PARSE_ERRORS as error:
        raise malformed(error) from None


def tensor_from_json(spec: InputSpec, raw: bytes | msgspec.Raw, path: str) -> Tensor:
    """The nested lists `raw` as the tensor `spec`. Raises InvalidArgument naming the element under `path`
    (`inputs[3][7]`), MalformedBody for what is not JSON."""
    row = spec.row
    text = memoryview(raw)
    if len(text) >= LONG_BYTES:
        packed = packed_rows(spec.datatype, spec.shape, bytes(text), 0, len(text))
        if packed is not None:
            shape = (packed[0], *spec.shape[1:])
            return Tensor(name=spec.name, datatype=spec.datatype.number, shape=shape, data=packed[1])
    try:
        value = spec.decoder.decode(raw)
        if row is not None and value and spec.shape[0] in (-1, len(value)):
            if len(value) == 1:
                data = row.pack(*value[0])  # pack objects to a row of another width itself
            else:
                pack = row.pack
                data = b"".join([pack(*one) for one in value])
            return Tensor(
                name=spec.name, datatype=spec.datatype.number, shape=(len(value), spec.width), data=data
            )
        flat, shape = _flatten(spec, value)
        return Tensor(
            name=spec.name, datatype=spec.datatype.number, shape=shape, data=pack_flat(spec.datatype, flat)
        )
    except msgspec.ValidationError:
        pass
    except PARSE_ERRORS as error:
        raise malformed(error) from None
    except (struct.error, OverflowError, _Misfit):
        pass
    raise _misfit(spec, parse_any(raw, path), path)


def tensor_of(spec: InputSpec, value: Any) -> Tensor | None:
    """Lists that are parsed already as the tensor `spec`; None where `value` does not fit."""
    try:
        flat, shape = _flatten(spec, value)
        return _checked(spec, flat, shape)
    except _Misfit:
        return None


def tensor_of_rows(spec: InputSpec, flat: list[Any], rows: int) -> Tensor | None:
    """`flat` as a tensor of `rows` rows of `spec`'s columns; None where it does not fit."""
    if spec.shape[0] not in (-1, rows):
        return None
    try:
        return _checked(spec, flat, (rows, spec.shape[1]))
    except _Misfit:
        return None


def _checked(spec: InputSpec, flat: list[Any], shape: tuple[int, ...]) -> Tensor:
    if not right_types(spec.datatype, flat):
        raise _Misfit
    try:
        data = pack_flat(spec.datatype, flat)
    except (struct.error, OverflowError):
        raise _Misfit from None
    return Tensor(name=spec.name, datatype=spec.datatype.number, shape=shape, data=data)


def tensor_from_column(spec: InputSpec, raw: bytes | msgspec.Raw, path: str) -> Tensor:
    """The flat list `raw` as rows of one element each."""
    return _from_flat(spec, raw, None, path)


def tensor_from_flat(spec: InputSpec, raw: bytes | msgspec.Raw, shape: tuple[int, ...], path: str) -> Tensor:
    """The flat list `raw` as a tensor of `shape`, which the caller has checked against the signature."""
    return _from_flat(spec, raw, shape, path)


def _from_flat(spec: InputSpec, raw: bytes | msgspec.Raw, shape: tuple[int, ...] | None, path: str) -> Tensor:
    try:
        count, data = _counted(spec, raw)
        if shape is None:
            shape = (count, 1)
            if spec.shape[0] not in (-1, count):
                raise InvalidArgument(
                    f"{path} has {count} elements where {spec.shape[0]} are expected.", field=path
                )
        elif count != prod(shape):
            raise InvalidArgument(
                f"{path} has {count} elements where shape {list(shape)} asks for {prod(shape)}.",
                field=path,
            )
        return Tensor(
            name=spec.name,
            datatype=spec.datatype.number,
            shape=shape,
            data=data if isinstance(data, bytes) else pack_flat(spec.datatype, data),
        )
    except msgspec.ValidationError:
        pass
    except PARSE_ERRORS as error:
        raise malformed(error) from None
    except (struct.error, OverflowError):
        pass
    explain_flat(spec, parse_any(raw, path), path)
    raise InvalidArgument(f"{path} is not a list of {spec.datatype.name}.", field=path)


def _counted(spec: InputSpec, raw: bytes | msgspec.Raw) -> tuple[int, bytes | list[Any]]:
    """How many elements the flat list `raw` has; and these, packed already where there are many numbers."""
    text = memoryview(raw)
    if len(text) >= LONG_BYTES:
        data = packed_numbers(spec.datatype, bytes(text), 0, len(text))
        if data is not None:
            return len(data) // spec.datatype.itemsize, data
    flat = spec.flat_decoder.decode(raw)
    return len(flat), flat


def pack_flat(datatype: Datatype, flat: list[Any]) -> bytes:
    """Elements in row-major order as raw little-endian bytes. Raises OverflowError or struct.error for one
    that does not fit."""
    if datatype is BYTES:
        return pack_bytes([text.encode() if isinstance(text, str) else text for text in flat])
    if datatype is BF16:
        raise OverflowError("BF16 has no JSON form")
    return struct.pack(f"<{len(flat)}{datatype.code}", *flat)


def pack_bytes(elements: list[bytes]) -> bytes:
    """BYTES elements on the wire: 4-byte little-endian length, then the bytes, each."""
    return b"".join(chain.from_iterable((len(one).to_bytes(4, "little"), one) for one in elements))


def _misfit(spec: InputSpec, value: Any, path: str) -> InvalidArgument:
    """What is wrong with `value`, which a fast way did not take."""
    try:
        explain(spec, value, spec.shape, path)
    except InvalidArgument as error:
        return error
    return InvalidArgument(f"{path} is not a tensor of {spec.datatype.name} {list(spec.shape)}.", field=path)


_LISTS = frozenset({list})


class _Misfit(Exception):
    """Not lists, of unequal lengths, of a length the signature does not allow, or of the wrong elements."""


def _flatten(spec: InputSpec, value: Any) -> tuple[list[Any], tuple[int, ...]]:
    """Elements in row-major order, and the shape."""
    shape: list[int] = []
    level: list[Any] = [value]
    for wanted in spec.shape:
        if not _LISTS.issuperset(map(type, level)):
            raise _Misfit
        size = len(level[0])
        if (wanted not in (-1, size)) or size == 0 or any(len(item) != size for item in level):
            raise _Misfit
        shape.append(size)
        level = level[0] if len(level) == 1 else list(chain.from_iterable(level))
    return level, tuple(shape)
