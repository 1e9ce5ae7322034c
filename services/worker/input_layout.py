"""What a model version takes, worked out once from its signature, so that checking a request costs a few
comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import DataType, Signature, Tensor

from services.common.errors import InvalidArgument
from services.worker.backends.port import EXTRA_OUTPUTS, Padding
from services.worker.tensors import NUMPY_TYPES, Array, Buffer, datatype_name, decode_bytes, to_array

Shape = tuple[int, ...]
_BOOL: Final = DataType.DATA_TYPE_BOOL

#: In a merge key: rows are padded to the longest of their batch along this dimension.
OPEN = -1

#: Requests with equal keys may run in one batch: outputs wanted, and per input the shape of one row (the
#: whole shape where the model is not batched). Model version and datatypes are fixed by the layout itself.
MergeKey = tuple[tuple[str, ...], tuple[Shape, ...]]


@dataclass(frozen=True, slots=True)
class _Input:
    name: str
    datatype: DataType
    # Without the row dimension where the model is batched.
    shape: Shape
    # Bytes of one element; 0 for BYTES.
    itemsize: int
    # Bytes of one row; None where a dimension varies or elements are BYTES.
    row_bytes: int | None


class InputLayout:
    """Checks requests against one signature and makes the arrays of a batch.

    Raises ValueError for a signature that cannot be served."""

    def __init__(self, signature: Signature, padding: Padding | None = None, backend: str = "") -> None:
        """`backend` names what runs it, for outputs beyond the signature's."""
        self.batched = signature.batched
        self._inputs = tuple(
            _input(spec.name, spec.datatype, tuple(spec.shape), self.batched) for spec in signature.inputs
        )
        if not self._inputs:
            raise ValueError("the signature names no inputs")
        self._order = {spec.name: position for position, spec in enumerate(self._inputs)}
        #: Outputs that can be asked for and are not given otherwise, with their datatypes.
        self.extra_outputs = EXTRA_OUTPUTS.get(backend, {})
        self._outputs = {spec.name for spec in signature.outputs} | self.extra_outputs.keys()
        #: No dimension but the rows varies, and no element has a length of its own.
        self.fixed = all(spec.row_bytes is not None for spec in self._inputs)
        #: Rows of different lengths may run together.
        self.padded = padding is not None
        # Position, dimension within a row and filling of the inputs whose rows may differ in length.
        self._ragged = tuple(
            (self._order[name], axis, filling)
            for name, (axis, filling) in (padding.inputs.items() if padding is not None else ())
        )
        # The one input of most models: fixed shape, any number of rows.
        first = self._inputs[0]
        plain = len(self._inputs) == 1 and self.batched and first.datatype != DataType.DATA_TYPE_BOOL
        self._plain = first if plain and self.fixed else None
        self._plain_shape = list(first.shape)
        self._plain_row = [1, *first.shape]
        self._plain_key: MergeKey = ((), tuple(spec.shape for spec in self._inputs))

    def take(
        self, request: PredictRequest, apart: list[memoryview | None] | None = None
    ) -> tuple[int, MergeKey, tuple[Buffer, ...]]:
        """Rows, merge key and the inputs' bytes in the signature's order. `apart` is the data of inputs that
        came apart from them, by position in the request.

        Raises InvalidArgument naming the input."""
        tensors = request.inputs
        if (plain := self._plain) is not None and len(tensors) == 1:
            tensor = tensors[0]
            content: Buffer = tensor.data if apart is None else _content(tensor, apart, 0)
            size = tensor.shape[:]
            if (
                tensor.name == plain.name
                and tensor.datatype == plain.datatype
                and (size == self._plain_row or (size and size[1:] == self._plain_shape))
                and len(content) == size[0] * (plain.row_bytes or 0)
                and size[0] > 0
                and not request.outputs
            ):
                return size[0], self._plain_key, (content,)
        if len(tensors) != len(self._inputs):
            self._explain(request)
        data: tuple[Buffer, ...]
        shapes: tuple[Shape, ...]
        if len(self._inputs) == 1:
            tensor, spec = tensors[0], self._inputs[0]
            if tensor.name != spec.name:
                self._explain(request)
            whole = _content(tensor, apart, 0)
            rows, shape = self._check(tensor, whole, spec)
            data, shapes = (whole,), (shape,)
        else:
            rows, shapes, data = self._take_many(request, apart)
        if self._ragged:
            shapes = self._open_length(shapes)
        outputs = request.outputs
        if not outputs:
            return rows, self._plain_key if self.fixed else ((), shapes), data
        return rows, (self._wanted(tuple(outputs)), shapes), data

    def is_ragged(self, key: MergeKey) -> bool:
        """Whether requests of that key may differ in length."""
        return any(OPEN in key[1][position] for position, _, _ in self._ragged)

    def length(self, rows: int, data: Sequence[Buffer]) -> int:
        """How long the rows of a request with a ragged key are."""
        position, _, _ = self._ragged[0]
        spec = self._inputs[position]
        fixed = prod(size for size in spec.shape if size >= 0)
        return len(data[position]) // (rows * fixed * spec.itemsize)

    def with_length(self, key: MergeKey, length: int) -> MergeKey:
        """The key of requests whose rows are all `length` long."""
        return key[0], tuple(tuple(length if d == OPEN else d for d in shape) for shape in key[1])

    def filled_up(self, data: Sequence[Buffer], rows: int, length: int, to: int) -> list[Buffer]:
        """The inputs of one request with its rows filled up from `length` to `to`."""
        filled = list(data)
        for position, axis, filling in self._ragged:
            spec = self._inputs[position]
            array = to_array(data[position], spec.datatype, (rows, *_sized(spec.shape, length)))
            wide = np.empty((rows, *_sized(spec.shape, to)), array.dtype)
            wide[...] = np.frombuffer(filling, array.dtype)[0]
            wide[(slice(None),) * (axis + 1) + (slice(length),)] = array
            filled[position] = wide.tobytes()
        return filled

    def arrays(self, key: MergeKey, data: Sequence[Buffer], rows: int) -> dict[str, Array]:
        """The inputs of a batch: `data` holds per input the joined bytes of all its requests."""
        if (plain := self._plain) is not None:
            return {plain.name: to_array(data[0], plain.datatype, (rows, *plain.shape))}
        shapes = key[1]
        return {
            spec.name: to_array(joined, spec.datatype, (rows, *shape) if self.batched else shape)
            for spec, shape, joined in zip(self._inputs, shapes, data, strict=True)
        }

    def named_shapes(self, key: MergeKey, rows: int) -> list[tuple[bytes, DataType, Shape]]:
        """UTF-8 name, datatype and shape of the same inputs, for the prediction log."""
        shapes = [(rows, *shape) for shape in key[1]] if self.batched else key[1]
        return [
            (spec.name.encode(), spec.datatype, shape)
            for spec, shape in zip(self._inputs, shapes, strict=True)
        ]

    def synthetic(self, rows: int, variable: int) -> tuple[MergeKey, list[bytes]]:
        """Inputs for a warm-up run: zeros (a zero is a valid index, token and measurement), text for BYTES,
        `variable` for each dimension that the signature leaves open."""
        shapes = tuple(tuple(variable if d < 0 else d for d in spec.shape) for spec in self._inputs)
        data = []
        for spec, shape in zip(self._inputs, shapes, strict=True):
            elements = prod(shape) * (rows if self.batched else 1)
            data.append(
                b"\x07\0\0\0warm up" * elements if not spec.itemsize else bytes(elements * spec.itemsize)
            )
        return ((), shapes), data

    @property
    def variable(self) -> bool:
        """Whether a dimension other than the rows is left open."""
        return any(d < 0 for spec in self._inputs for d in spec.shape)

    def _open_length(self, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        """`shapes` without the length that requests may differ in. Empty tensors are left as they are."""
        position, axis, _ = self._ragged[0]
        length, named = shapes[position][axis], self._inputs[position].name
        for other, along, _ in self._ragged[1:]:
            if shapes[other][along] != length:
                name = self._inputs[other].name
                raise InvalidArgument(
                    f"rows of {name} are {shapes[other][along]} long, those of {named} {length}",
                    field=f"inputs.{name}",
                )
        if any(0 in shapes[ragged] for ragged, _, _ in self._ragged):
            return shapes
        opened = list(shapes)
        for ragged, along, _ in self._ragged:
            shape = shapes[ragged]
            opened[ragged] = (*shape[:along], OPEN, *shape[along + 1 :])
        return tuple(opened)

    def _take_many(
        self, request: PredictRequest, apart: list[memoryview | None] | None
    ) -> tuple[int, tuple[Shape, ...], tuple[Buffer, ...]]:
        count = len(self._inputs)
        shapes: list[Shape] = [()] * count
        data: list[Buffer] = [b""] * count
        seen = [False] * count
        rows = -1
        for at, tensor in enumerate(request.inputs):
            position = self._order.get(tensor.name, -1)
            if position < 0 or seen[position]:
                self._explain(request)
            seen[position] = True
            content = data[position] = _content(tensor, apart, at)
            of_this, shapes[position] = self._check(tensor, content, self._inputs[position])
            if rows >= 0 and of_this != rows:
                raise InvalidArgument(
                    f"{tensor.name} has {of_this} rows, the inputs before it {rows}",
                    field=f"inputs.{tensor.name}",
                )
            rows = of_this
        return rows, tuple(shapes), tuple(data)

    def _check(self, tensor: Tensor, content: Buffer, spec: _Input) -> tuple[int, Shape]:
        if tensor.datatype != spec.datatype:
            raise InvalidArgument(
                f"{spec.name} is {datatype_name(tensor.datatype)}, "
                f"the model takes {datatype_name(spec.datatype)}",
                field=f"inputs.{spec.name}",
            )
        shape = tuple(tensor.shape)
        if self.batched:
            rows, row_shape = (shape[0], shape[1:]) if shape else (0, shape)
            if rows < 1:
                raise InvalidArgument(f"{spec.name} has no rows", field=f"inputs.{spec.name}")
        else:
            rows, row_shape = 1, shape
        if spec.row_bytes is not None:
            if row_shape == spec.shape and len(content) == rows * spec.row_bytes:
                if spec.datatype == _BOOL:
                    _check_bools(content, spec)
                return rows, row_shape
        elif len(row_shape) == len(spec.shape) and all(
            want in (-1, have) and have >= 0 for want, have in zip(spec.shape, row_shape, strict=True)
        ):
            _check_length(content, rows * prod(row_shape), spec)
            return rows, row_shape
        self._explain_tensor(len(content), spec, shape, row_shape, rows)
        raise AssertionError("unreachable: the tensor was found wrong")

    def _explain_tensor(self, nbytes: int, spec: _Input, shape: Shape, row_shape: Shape, rows: int) -> None:
        if row_shape == spec.shape:
            expected = rows * (spec.row_bytes or 0)
            raise InvalidArgument(
                f"{spec.name} has {nbytes} bytes, its shape asks for {expected}",
                field=f"inputs.{spec.name}",
            )
        wanted = [-1, *spec.shape] if self.batched else list(spec.shape)
        raise InvalidArgument(
            f"{spec.name} has shape {list(shape)}, the model takes {wanted}", field=f"inputs.{spec.name}"
        )

    def _wanted(self, outputs: tuple[str, ...]) -> tuple[str, ...]:
        for name in outputs:
            if name not in self._outputs:
                raise InvalidArgument(f"the model has no output {name}", field=f"outputs.{name}")
        return outputs

    def _explain(self, request: PredictRequest) -> None:
        """Raise what is wrong with the set of input names."""
        given: set[str] = set()
        for tensor in request.inputs:
            if tensor.name not in self._order:
                raise InvalidArgument(f"the model has no input {tensor.name}", field=f"inputs.{tensor.name}")
            if tensor.name in given:
                raise InvalidArgument(f"{tensor.name} is given twice", field=f"inputs.{tensor.name}")
            given.add(tensor.name)
        missing = next(name for name in self._order if name not in given)
        raise InvalidArgument(f"{missing} is missing", field=f"inputs.{missing}")


def _input(name: str, datatype: DataType, shape: Shape, batched: bool) -> _Input:
    if datatype != DataType.DATA_TYPE_BYTES and datatype not in NUMPY_TYPES:
        raise ValueError(f"input {name} has the unknown datatype {datatype_name(datatype)}")
    if batched and not shape:
        raise ValueError(f"input {name} has no dimension for rows")
    row_shape = shape[1:] if batched else shape
    itemsize = 0 if datatype == DataType.DATA_TYPE_BYTES else NUMPY_TYPES[datatype].itemsize
    fixed = itemsize > 0 and all(d >= 0 for d in row_shape)
    return _Input(name, datatype, row_shape, itemsize, prod(row_shape) * itemsize if fixed else None)


def _content(tensor: Tensor, apart: list[memoryview | None] | None, at: int) -> Buffer:
    """The data of `tensor`, input number `at` of its request."""
    if apart is not None and (view := apart[at]) is not None:
        return view
    return tensor.data


def _sized(shape: Shape, length: int) -> Shape:
    return tuple(length if d < 0 else d for d in shape)


def _check_length(data: Buffer, elements: int, spec: _Input) -> None:
    field = f"inputs.{spec.name}"
    if not spec.itemsize:
        try:
            found = len(decode_bytes(bytes(data)))
        except InvalidArgument as error:
            raise InvalidArgument(f"{spec.name}: {error.message}", field=field) from None
        if found != elements:
            raise InvalidArgument(
                f"{spec.name} has {found} elements, its shape asks for {elements}", field=field
            )
        return
    if len(data) != elements * spec.itemsize:
        raise InvalidArgument(
            f"{spec.name} has {len(data)} bytes, its shape asks for {elements * spec.itemsize}", field=field
        )
    if spec.datatype == _BOOL:
        _check_bools(data, spec)


def _check_bools(data: Buffer, spec: _Input) -> None:
    # Any other byte is undefined behaviour in a numpy bool array.
    if bytes(data).translate(None, b"\0\1"):
        raise InvalidArgument(f"{spec.name} holds bytes other than 0 and 1", field=f"inputs.{spec.name}")
