"""What the reading of a chunk gives: tensors of the rows that can run, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec
from numpy.typing import NDArray

from services.common.errors import HeadraceError
from services.worker.tensors import NUMPY_TYPES, Array, datatype_name

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input as a row has it. `shape` is one row's, -1 where the row decides; `columns` name the elements
    of a tabular row."""

    name: str
    datatype: int
    shape: tuple[int, ...]
    columns: tuple[str, ...] = ()

    @property
    def tabular(self) -> bool:
        """Whether named columns stand for this input."""
        return bool(self.columns) and self.shape == (len(self.columns),)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of its arrays; BYTES are objects."""
        return NUMPY_TYPES.get(self.datatype, np.dtype(object))

    @property
    def text(self) -> bool:
        return self.datatype == DataType.DATA_TYPE_BYTES

    @property
    def type_name(self) -> str:
        """`FP32`."""
        return datatype_name(self.datatype)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a row of a model consists of. Where the model is not `batched`, a row is a whole request."""

    specs: tuple[InputSpec, ...]
    batched: bool

    @classmethod
    def of(cls, signature: Signature) -> Inputs:
        """The inputs of `signature`."""
        return cls(tuple(_spec(spec, signature.batched) for spec in signature.inputs), signature.batched)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names that stand for the only input without naming it."""
        return self.specs[0].columns if len(self.specs) == 1 and self.specs[0].tabular else ()

    @property
    def listed(self) -> str:
        """What the model takes, for an error."""
        names = self.columns or tuple(spec.name for spec in self.specs)
        return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one shape: `arrays` by input with the rows first, `places` their positions in the chunk,
    ascending."""

    places: Places
    arrays: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Rows:
    """A chunk of `count` rows: each in one group, or by its place in `failures`. `custom_ids` has one entry
    per row; None where the input has none. `outputs` are those to ask the model for, empty: all."""

    count: int
    groups: Sequence[Group]
    failures: Mapping[int, HeadraceError] = field(default_factory=dict)
    custom_ids: Sequence[str | None] | None = None
    outputs: tuple[str, ...] = ()


def without(count: int, failed: Mapping[int, object]) -> Places:
    """The places of the rows that did not fail."""
    places = np.arange(count, dtype=np.int64)
    if not failed:
        return places
    kept = np.ones(count, bool)
    kept[list(failed)] = False
    return places[kept]


def _spec(spec: TensorSpec, batched: bool) -> InputSpec:
    shape = tuple(spec.shape)[1:] if batched else tuple(spec.shape)
    return InputSpec(spec.name, spec.datatype, shape, tuple(spec.columns))
