"""What a request says of its caller for experiments: session and attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Parameter

from services.common.errors import InvalidArgument

#: Characters of a user or a session.
MAX_UNIT: Final = 512
_MOST: Final = 32
_MAX_NAME: Final = 64
_MAX_TEXT: Final = 256


def session_of(session: str | int | None, field: str = "session_id") -> str:
    """The session that `session` names. Raises InvalidArgument for one that is too long."""
    named = "" if session is None else str(session)
    if len(named) > MAX_UNIT:
        raise InvalidArgument(f"{field} is longer than {MAX_UNIT} characters.", field=field)
    return named


def fill_attributes(request: PredictRequest, attributes: Mapping[str, Any]) -> None:
    """Put `attributes` into `request`. Raises InvalidArgument naming what is wrong: all of them, or one."""
    if len(attributes) > _MOST:
        raise InvalidArgument(f"There are more than {_MOST} attributes.", field="attributes")
    for name, value in attributes.items():
        where = f"attributes.{name[:_MAX_NAME]}"
        if not 1 <= len(name) <= _MAX_NAME:
            raise InvalidArgument(
                f"{where}: the name of an attribute has 1 to {_MAX_NAME} characters.", field=where
            )
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            raise InvalidArgument(f"{where} is longer than {_MAX_TEXT} characters.", field=where)
        request.attributes[name].CopyFrom(parameter(value, where))


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
