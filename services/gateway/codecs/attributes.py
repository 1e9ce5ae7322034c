"""What a request says of its caller for experiments: session and attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Parameter

from services.common.errors import InvalidArgument
from services.common.targeting import MAX_UNIT, check_attributes


def session_of(session: str | int | None, field: str = "session_id") -> str:
    """The session that `session` names. Raises InvalidArgument for one that is too long."""
    named = "" if session is None else str(session)
    if len(named) > MAX_UNIT:
        raise InvalidArgument(f"{field} is longer than {MAX_UNIT} characters.", field=field)
    return named


def fill_attributes(request: PredictRequest, attributes: Mapping[str, Any]) -> None:
    """Put `attributes` into `request`. Raises InvalidArgument naming what is wrong: all of them, or one."""
    check_attributes(attributes)
    for name, value in attributes.items():
        request.attributes[name].CopyFrom(parameter(value, f"attributes.{name}"))


def context_fields(session: str | int | None, attributes: Mapping[str, Any] | None) -> bytes:
    """Session and attributes as fields of a serialized PredictRequest. Raises InvalidArgument."""
    said = PredictRequest(session=session_of(session))
    if attributes:
        fill_attributes(said, attributes)
    return said.SerializeToString()


def parameter(value: object, where: str) -> Parameter:
    """`value` for the wire. Raises InvalidArgument for what is no text, number or truth value."""
    if isinstance(value, bool):
        return Parameter(bool_value=value)
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise InvalidArgument(f"{where} is outside 64 bits.", field=where)
        return Parameter(int64_value=value)
    if isinstance(value, float):
        return Parameter(double_value=value)
    if isinstance(value, str):
        return Parameter(string_value=value)
    raise InvalidArgument(f"{where} is no text, number or truth value.", field=where)
