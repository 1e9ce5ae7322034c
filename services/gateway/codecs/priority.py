"""How urgent a request is, as clients write it: `high`, `normal` or `low`, or a level of Triton's."""

from __future__ import annotations

from headrace.v1.dataplane_pb2 import PredictRequest, Priority

from services.common.errors import InvalidArgument

_BY_NAME: dict[str | bytes, Priority] = {
    "high": Priority.PRIORITY_HIGH,
    "normal": Priority.PRIORITY_NORMAL,
    "low": Priority.PRIORITY_LOW,
}
_BY_NAME |= {name.encode(): value for name, value in _BY_NAME.items() if isinstance(name, str)}

#: Triton's levels: 0 is the default, 1 the most urgent, and there may be any number of them.
_BY_LEVEL = {0: Priority.PRIORITY_UNSPECIFIED, 1: Priority.PRIORITY_HIGH, 2: Priority.PRIORITY_NORMAL}

#: What, written behind a serialized PredictRequest, makes it one of that priority.
PRIORITIES: dict[int, bytes] = {
    value: PredictRequest(priority=value).SerializeToString() for value in _BY_NAME.values()
}


def priority_of(said: object, field: str = "X-Request-Priority") -> Priority:
    """The priority that `said` names. Raises InvalidArgument naming `field`."""
    found = _BY_NAME.get(said) if isinstance(said, str | bytes) else None
    if found is None:
        raise InvalidArgument(f"{field} must be high, normal or low.", field=field)
    return found


def priority_of_parameter(said: object) -> Priority:
    """The priority that a parameter of the Open Inference Protocol names, or the nearest to Triton's level.
    Raises InvalidArgument."""
    if isinstance(said, int) and not isinstance(said, bool) and said >= 0:
        return _BY_LEVEL.get(said, Priority.PRIORITY_LOW)
    return priority_of(said, "parameters.priority")
