"""How urgent a request is, as clients write it: `high`, `normal` or `low`."""

from __future__ import annotations

from headrace.v1.dataplane_pb2 import PredictRequest, Priority

from services.common.errors import InvalidArgument

_BY_NAME: dict[str | bytes, Priority] = {
    "high": Priority.PRIORITY_HIGH,
    "normal": Priority.PRIORITY_NORMAL,
    "low": Priority.PRIORITY_LOW,
}
_BY_NAME |= {name.encode(): value for name, value in _BY_NAME.items() if isinstance(name, str)}

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
