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


_body = msgspec.json.Decoder(RowsBody)


def decode_rows(raw: bytes | bytearray) -> RowsBody | None:
    """`raw` read as that; None where it is something else."""
    try:
        return _body.decode(raw)
    except _MISFITS:
        return None


def with_context(request: bytes | None, body: RowsBody) -> bytes | None:
    """`request` with the session and the attributes of its body; None where they do not fit."""
    if request is None:
        return None
    try:
        return request + context_fields(body.session_id, body.attributes)
    except InvalidArgument:
        return None
