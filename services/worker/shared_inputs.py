"""Inputs that did not come with their request, but lie in shared memory of the machine."""

from __future__ import annotations

from typing import Final

from headrace.v1.dataplane_pb2 import PredictRequest

from services.common.errors import InvalidArgument, Unimplemented
from services.common.shared_memory import object_name, read

#: As much as comes in a frame: reading it holds up the event loop as receiving it would.
_MOST_BYTES: Final = 64 << 20


class SharedInputs:
    """Reads them where that is allowed: the gateways that the worker answers to run on the same machine."""

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed

    def read(self, request: PredictRequest, apart: list[memoryview | None] | None) -> list[memoryview | None]:
        """`apart`, the data that came apart from the request, completed by a copy of what lies there now.

        Raises InvalidArgument naming the input, Unimplemented where nothing may be read."""
        found: list[memoryview | None] = [None] * len(request.inputs) if apart is None else list(apart)
        left = _MOST_BYTES
        for position, tensor in enumerate(request.inputs):
            if not tensor.HasField("shared_memory"):
                continue
            field = f"inputs.{tensor.name}"
            if not self._allowed:
                raise Unimplemented("the worker of this model reads no shared memory", field=field)
            place = tensor.shared_memory
            left -= place.byte_size
            if left < 0:
                raise InvalidArgument(f"{tensor.name} is larger than a request may be", field=field)
            name = object_name(place.key, field)
            found[position] = memoryview(read(name, place.offset, place.byte_size, field, place.identity))
        return found
