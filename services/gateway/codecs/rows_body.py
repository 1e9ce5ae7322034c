"""The most common body, parsed. Not in `compiled`: mypyc keeps no annotations that msgspec could read."""

from __future__ import annotations

from typing import Any

import msgspec

from services.common.errors import InvalidArgument
from services.gateway.codecs.attributes import context_fields
from services.gateway.codecs.tensors import PARSE_ERRORS

_MISFITS = (msgspec.ValidationError, *PARSE_ERRORS)


class RowsBody(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A body with rows of numbers, or one row, and nothing that is rare."""

    model: str = ""
    inputs: list[list[float]] | None = None
    input: list[float] | None = None
    user_id: str | int | None = None
    session_id: str | int | None = None
    attributes: dict[str, Any] | None = None


class LongBody(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The same with many rows, `inputs` still JSON."""

    inputs: msgspec.Raw
    model: str = ""
    user_id: str | int | None = None
    session_id: str | int | None = None
    attributes: dict[str, Any] | None = None


_body = msgspec.json.Decoder(RowsBody)
_long_body = msgspec.json.Decoder(LongBody)
#: From so many bytes on a body is long. What of it are no rows is short.
LONG_BODY_BYTES = 4096
_MAX_REST = 4096
#: Stands for rows while the rest is parsed.
_STAND_IN = b'["rows"]'


def decode_rows(raw: bytes | bytearray) -> RowsBody | None:
    """`raw` read as that; None where it is something else."""
    try:
        return _body.decode(raw)
    except _MISFITS:
        return None


def decode_long(raw: bytes) -> tuple[LongBody, int, int] | None:
    """The rest of a long body, and where the list of its rows begins and ends, if what stands there is a list
    at all; None where it is something else.

    A JSON value may be exchanged for another without a say in how the rest is read. So the rest is parsed
    with another list in the place of the rows, and that must be what `inputs` is then."""
    start = raw.find(b"[", raw.find(b'"inputs"'))
    quote = raw.find(b'"', start)
    end = raw.rfind(b"]", start, quote if quote >= 0 else len(raw)) + 1
    if start < 0 or end <= start or len(raw) - (end - start) > _MAX_REST:
        return None
    rest = raw[:start] + _STAND_IN + raw[end:]
    if rest.count(_STAND_IN) != 1:
        return None
    try:
        body = _long_body.decode(rest)
    except _MISFITS:
        return None
    return (body, start, end) if bytes(body.inputs) == _STAND_IN else None


def with_context(request: bytes | None, body: RowsBody | LongBody) -> bytes | None:
    """`request` with the session and the attributes of its body; None where they do not fit."""
    if request is None:
        return None
    try:
        return request + context_fields(body.session_id, body.attributes)
    except InvalidArgument:
        return None
