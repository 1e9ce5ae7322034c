"""Tensors of the Open Inference Protocol that lie in shared memory: inputs that say where they are, and
outputs that are wanted there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from headrace.v1.tensor_pb2 import SharedMemory, Tensor

from services.common.errors import InvalidArgument, Unimplemented
from services.common.shared_memory import write
from services.gateway.datatypes import BYTES
from services.gateway.regions import Region
from services.gateway.signature import InputSpec

REGION: Final = "shared_memory_region"
_OFFSET, _BYTE_SIZE = "shared_memory_offset", "shared_memory_byte_size"

Scalar = str | int | float | bool | None
#: The caller's region of that name; the other argument is the field to blame. Raises InvalidArgument or
#: Unimplemented.
Find = Callable[[str, str], Region]


def find_none(_name: str, field: str) -> Region:
    """Where nobody has regions."""
    raise Unimplemented(f"{field}: shared memory is not served.", field=field)


@dataclass(frozen=True, slots=True)
class Place:
    """`byte_size` bytes of `region`, which the caller calls `name`, from `offset` of it."""

    name: str
    region: Region
    offset: int
    byte_size: int


def place_of(parameters: Mapping[str, Scalar], find: Find, where: str) -> Place:
    """The place that `parameters`, REGION among them, name. Raises InvalidArgument."""
    name = parameters[REGION]
    if not isinstance(name, str):
        raise InvalidArgument(f"{where}: {REGION} must be a text.", field=where)
    region = find(name, where)
    offset, size = _number(parameters, _OFFSET, where), _number(parameters, _BYTE_SIZE, where)
    if _BYTE_SIZE not in parameters:
        raise InvalidArgument(f"{where}: {_BYTE_SIZE} is missing.", field=where)
    if offset + size > region.byte_size:
        raise InvalidArgument(
            f"{where}: {size} bytes from {offset} are more than the region {name!r} has, {region.byte_size}.",
            field=where,
        )
    return Place(name, region, offset, size)


def input_in(place: Place, spec: InputSpec, shape: list[int], where: str) -> Tensor:
    """The input whose data lies in `place`. Raises InvalidArgument where numbers of `shape` take another
    size; elements of BYTES are counted where they are read."""
    wanted = prod(shape) * spec.datatype.itemsize
    if spec.datatype is not BYTES and place.byte_size != wanted:
        raise InvalidArgument(
            f"{where} has {place.byte_size} bytes where shape {shape} asks for {wanted}.", field=where
        )
    region = place.region
    return Tensor(
        name=spec.name,
        datatype=spec.datatype.number,
        shape=shape,
        shared_memory=SharedMemory(
            key=region.object,
            offset=region.offset + place.offset,
            byte_size=place.byte_size,
            identity=region.identity,
        ),
    )


class OutputPlaces:
    """Where a request wants outputs. The gateway puts them there when it answers: of the workers two may run
    one request, and one of them after its caller has gone."""

    def __init__(self, places: Mapping[str, Place], find: Find) -> None:
        self._places = dict(places)
        self._find = find

    def put(self, outputs: Sequence[Tensor]) -> dict[str, dict[str, Scalar]]:
        """Write those of `outputs` that have a place, and say by name what the answer says in place of their
        data. Nothing is written unless all fit, and nothing into what was unregistered meanwhile. Raises
        InvalidArgument."""
        found = [
            (tensor, place) for tensor in outputs if (place := self._places.get(tensor.name)) is not None
        ]
        for tensor, place in found:
            where = f"outputs.{tensor.name}"
            if self._find(place.name, where) != place.region:
                raise InvalidArgument(f"{where}: the region {place.name!r} is another one now.", field=where)
            if len(tensor.data) > place.byte_size:
                raise InvalidArgument(
                    f"{where} has {len(tensor.data)} bytes, more than its {_BYTE_SIZE} of {place.byte_size}.",
                    field=where,
                )
        said: dict[str, dict[str, Scalar]] = {}
        for tensor, place in found:
            region, size = place.region, len(tensor.data)
            at = region.offset + place.offset
            write(region.object, at, tensor.data, f"outputs.{tensor.name}", region.identity)
            said[tensor.name] = {REGION: place.name, _BYTE_SIZE: size}
            if place.offset:
                said[tensor.name][_OFFSET] = place.offset
        return said


def output_places(
    outputs: Iterable[tuple[str, Mapping[str, Scalar] | None]], find: Find
) -> OutputPlaces | None:
    """The places that requested outputs, by name and parameters, are wanted in; None where there are none.
    Raises InvalidArgument."""
    places = {
        name: place_of(parameters, find, f"outputs.{name}")
        for name, parameters in outputs
        if parameters and REGION in parameters
    }
    return OutputPlaces(places, find) if places else None


def _number(parameters: Mapping[str, Scalar], name: str, where: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise InvalidArgument(f"{where}: {name} must be a whole number of bytes.", field=where)
    return value
