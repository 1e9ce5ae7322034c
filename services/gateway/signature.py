"""A model version's signature, compiled once so that a request costs lookups instead of decisions."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import msgspec
from headrace.v1.tensor_pb2 import Signature, Task, TensorSpec

from services.gateway.datatypes import BY_NUMBER, BYTES, Datatype


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input tensor. `shape` has -1 for variable dimensions and counts rows first where `batched`.

    `decoder` reads the nested lists of a whole tensor, `flat_decoder` its elements in one list. `row` packs
    one row of a two-dimensional tensor with a fixed width; None where the tensor is something else.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    batched: bool
    columns: tuple[str, ...]
    decoder: msgspec.json.Decoder[Any]
    flat_decoder: msgspec.json.Decoder[list[Any]]
    row: struct.Struct | None
    width: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row; the whole shape where the tensor has no rows."""
        return self.shape[1:] if self.batched else self.shape

    @property
    def scalar_rows(self) -> bool:
        """Whether each row is one element, so that a plain list is a column of them."""
        return self.batched and all(size == 1 for size in self.shape[1:])


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One output tensor."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """What a model version takes and gives. `prediction` and `probabilities` name outputs; the latter is
    empty where the model has none."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    batched: bool
    task: int
    is_classifier: bool
    prediction: str
    probabilities: str
    classes: tuple[str, ...]
    by_name: dict[str, InputSpec] = field(repr=False)
    output_names: frozenset[str] = field(repr=False)


def compile_signature(signature: Signature) -> ModelSignature:
    """The working form of `signature`. Raises ValueError where it names no input, no output or an unknown
    element type."""
    if not signature.inputs or not signature.outputs:
        raise ValueError("a signature needs at least one input and one output")
    inputs = tuple(_input(spec, batched=signature.batched) for spec in signature.inputs)
    outputs = tuple(
        OutputSpec(spec.name, _datatype(spec), tuple(spec.shape), tuple(spec.columns))
        for spec in signature.outputs
    )
    return ModelSignature(
        inputs=inputs,
        outputs=outputs,
        batched=signature.batched,
        task=signature.task,
        is_classifier=signature.task == Task.TASK_CLASSIFICATION,
        prediction=signature.prediction_output or outputs[0].name,
        probabilities=signature.probability_output,
        classes=tuple(signature.classes),
        by_name={spec.name: spec for spec in inputs},
        output_names=frozenset(spec.name for spec in outputs),
    )


def _input(spec: TensorSpec, *, batched: bool) -> InputSpec:
    datatype = _datatype(spec)
    shape = tuple(spec.shape)
    nested: Any = datatype.python
    flat: Any = list[nested]
    for _ in shape:
        nested = list[nested]
    width = shape[1] if len(shape) == 2 and datatype is not BYTES and datatype.code else 0
    return InputSpec(
        name=spec.name,
        datatype=datatype,
        shape=shape,
        batched=batched,
        columns=tuple(spec.columns),
        decoder=msgspec.json.Decoder(nested),
        flat_decoder=msgspec.json.Decoder(flat),
        row=struct.Struct(f"<{width}{datatype.code}") if width > 0 else None,
        width=width,
    )


def _datatype(spec: TensorSpec) -> Datatype:
    found = BY_NUMBER.get(spec.datatype)
    if found is None:
        raise ValueError(f"{spec.name} has no known element type")
    return found
