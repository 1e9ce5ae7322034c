"""What a record of predictions says about each feature: columns of numbers or of categories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from headrace.v1.dataplane_pb2 import Origin
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Signature, Task, Tensor, TensorSpec
from numpy.typing import NDArray

from services.common.tensors import Array, to_array

#: Double precision where they are read, single where they are held.
Numbers = NDArray[np.float64] | NDArray[np.float32]
Mask = NDArray[np.bool_]

#: A wider row is watched by its mean, spread and range instead of element by element.
MAX_COLUMNS = 128

#: Where a row must have come from: shadow traffic shows users' rows a second time.
WATCHED = (Origin.ORIGIN_UNSPECIFIED, Origin.ORIGIN_ONLINE, Origin.ORIGIN_BATCH)


@dataclass(frozen=True, slots=True)
class Observations:
    """Values per feature, all columns `rows` long. Names of inputs are those of the signature's columns;
    `prediction` and `prediction.confidence` stand for what the model answered."""

    rows: int
    numeric: dict[str, Numbers] = field(default_factory=dict)
    categorical: dict[str, list[str]] = field(default_factory=dict)

    def pick(self, places: NDArray[np.int64]) -> Observations:
        """The rows at these places."""
        chosen = places.tolist() if self.categorical else []
        return Observations(
            len(places),
            {name: values[places] for name, values in self.numeric.items()},
            {name: [labels[place] for place in chosen] for name, labels in self.categorical.items()},
        )


def observe(batch: PredictionBatch, signature: Signature) -> Observations:
    """The rows of `batch` that were answered, of users and of batch jobs.

    Shadow traffic is left out, since its rows are users' own a second time, and so are jobs whose owner wants
    them in no window. A record without payloads gives zero rows, one whose inputs were too large to be logged
    what was answered. Raises InvalidArgument for tensors that are
    not what they say they are.
    """
    kept = _watched_rows(batch)
    if batch.exclude_from_drift or not signature.batched or not kept.any():
        return Observations(0)
    if not batch.inputs and not batch.outputs:
        return Observations(0)
    numeric: dict[str, Numbers] = {}
    specs = {spec.name: spec for spec in signature.inputs}
    for tensor in batch.inputs:
        array = _rows(tensor, kept)
        numeric.update(_input_columns(tensor, array, specs.get(tensor.name, TensorSpec())))
    categorical: dict[str, list[str]] = {}
    answer = answer_output(signature)
    for tensor in batch.outputs:
        if tensor.name == answer:
            array = _rows(tensor, kept)
            if signature.task == Task.TASK_CLASSIFICATION:
                categorical["prediction"] = _labels(array, list(signature.classes))
            elif tensor.datatype == DataType.DATA_TYPE_BYTES:
                numeric["prediction.length"] = _lengths(array)
            else:
                numeric.update(_columns("prediction", array))
        elif tensor.name == signature.probability_output:
            array = _rows(tensor, kept)
            numeric["prediction.confidence"] = array.reshape(len(array), -1).astype(np.float64).max(axis=1)
    return Observations(int(kept.sum()), numeric, categorical)


def answer_output(signature: Signature) -> str:
    """The output that is the model's answer; empty where it has none."""
    return signature.prediction_output or (signature.outputs[0].name if signature.outputs else "")


def _watched_rows(batch: PredictionBatch) -> Mask:
    """For every row of the record's tensors: whether it counts."""
    answered = np.array(batch.codes, dtype=np.int64) == Code.CODE_OK
    rows = np.array(batch.rows, dtype=np.int64)[answered]
    origins = np.array(batch.origins or [0] * len(batch.codes), dtype=np.int64)[answered]
    return np.repeat(np.isin(origins, WATCHED), rows)


def _rows(tensor: Tensor, kept: Mask) -> Array:
    array = to_array(tensor.data, tensor.datatype, tensor.shape)
    return array if kept.all() and len(array) == len(kept) else array[kept]


def _input_columns(tensor: Tensor, array: Array, spec: TensorSpec) -> Iterator[tuple[str, Numbers]]:
    if tensor.datatype == DataType.DATA_TYPE_BYTES:
        yield f"{tensor.name}.length", _lengths(array)
        return
    names = list(spec.columns)
    if names and array.ndim == 2 and array.shape[1] == len(names):
        yield from zip(names, array.astype(np.float64).T, strict=True)
        return
    yield from _columns(tensor.name, array)


def _lengths(texts: Array) -> Numbers:
    return np.array([sum(map(len, row)) for row in texts.reshape(len(texts), -1).tolist()], dtype=np.float64)


def _columns(name: str, array: Array) -> Iterator[tuple[str, Numbers]]:
    """One feature per element of a flat row, or a summary of a row that is an image, a vector, a signal."""
    flat = array.reshape(len(array), -1).astype(np.float64)
    if flat.shape[1] == 1:
        yield name, flat[:, 0]
    elif array.ndim == 2 and flat.shape[1] <= MAX_COLUMNS:
        yield from ((f"{name}[{place}]", column) for place, column in enumerate(flat.T))
    else:
        yield f"{name}.mean", flat.mean(axis=1)
        yield f"{name}.std", flat.std(axis=1)
        yield f"{name}.min", flat.min(axis=1)
        yield f"{name}.max", flat.max(axis=1)


def _labels(array: Array, classes: list[str]) -> list[str]:
    flat = array.reshape(len(array), -1)[:, 0]
    if classes and np.issubdtype(flat.dtype, np.integer):
        return [classes[i] if 0 <= i < len(classes) else str(i) for i in flat.tolist()]
    return [
        value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in flat.tolist()
    ]
