"""Inputs that did not come with their request, but lie in shared memory of the machine."""

from __future__ import annotations

from typing import Final

from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import DataType, SharedMemory

from services.common.errors import InvalidArgument, Unimplemented
from services.common.shared_memory import object_name, read
from services.worker.mapped_objects import MappedObjects

#: As much as comes in a frame: reading it holds up the event loop as receiving it would.
_MOST_BYTES: Final = 64 << 20
#: What is smaller is copied sooner than looked at where it lies.
_COPIED_BELOW: Final = 64 << 10
#: Whatever a client makes of these while a model runs on them, the answer is wrong and nothing else. Whole
#: numbers may be places in a table, which are checked once and used afterwards.
_HARMLESS: Final = frozenset((DataType.DATA_TYPE_FP16, DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_FP64))
#: Vectors of numbers are loaded at such addresses in one step.
_ALIGNED: Final = 64


class SharedInputs:
    """Reads them where that is allowed: the gateways that the worker answers to run on the same machine."""

    def __init__(self, *, allowed: bool, mapped: MappedObjects | None = None) -> None:
        """Without `mapped` all are copied."""
        self._allowed = allowed
        self._mapped = mapped

    def read(self, request: PredictRequest, apart: list[memoryview | None] | None) -> list[memoryview | None]:
        """`apart`, the data that came apart from the request, completed by what lies there: a copy, or where
        it is many floating-point numbers, they themselves. Who changes those before the answer, or shortens
        the object (which leaves zeros), changes what is answered and logged.

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
            view = self._in_place(name, place) if tensor.datatype in _HARMLESS else None
            if view is None:
                view = memoryview(read(name, place.offset, place.byte_size, field, place.identity))
            found[position] = view
        return found

    def _in_place(self, name: str, place: SharedMemory) -> memoryview | None:
        if self._mapped is None or place.byte_size < _COPIED_BELOW or place.offset % _ALIGNED:
            return None
        return self._mapped.view(name, place.offset, place.byte_size, place.identity)
