"""Models that take rows of different lengths in one run: how their inputs are filled up and their outputs cut
back, as the artifact declares it.

An ONNX model declares `headrace.pad.<input>` = value in its metadata for every input with a dimension of open
length; all these dimensions carry one symbol in the graph. By that the author says that a row's answer does
not change when the row is filled up with the value: that the model masks it, or never looks ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec

from services.worker.backends.port import LoadFailed, Padding
from services.worker.tensors import NUMPY_TYPES, datatype_name

_PREFIX = "headrace.pad."

#: Names and dimensions as the graph gives them: sizes, or symbols for what is open.
Dimensions = Mapping[str, Sequence[object]]


def declared_padding(
    metadata: Mapping[str, str], inputs: Dimensions, outputs: Dimensions, signature: Signature
) -> Padding | None:
    """What `metadata` declares; None where it declares nothing. Raises LoadFailed for a declaration that the
    graph and the signature do not bear out."""
    given = {key.removeprefix(_PREFIX): text for key, text in metadata.items() if key.startswith(_PREFIX)}
    if not given:
        return None
    if not signature.batched:
        raise LoadFailed(f"{_PREFIX}* is declared for a model without rows")
    ragged = {spec.name: axes for spec in signature.inputs if (axes := _open(spec))}
    for name in sorted(ragged.keys() ^ given.keys()):
        known = name in ragged
        raise LoadFailed(
            f"{_PREFIX}{name} is missing" if known else f"{_PREFIX}{name} names no input of open length"
        )
    symbols = {inputs[name][axis + 1] for name, axes in ragged.items() for axis in axes}
    symbol = next(iter(symbols))
    if len(symbols) > 1 or not isinstance(symbol, str) or any(len(axes) > 1 for axes in ragged.values()):
        raise LoadFailed(f"inputs with {_PREFIX}* must share one named dimension of open length")
    specs = {spec.name: spec for spec in signature.inputs}
    return Padding(
        {name: (axes[0], _value(specs[name], given[name])) for name, axes in ragged.items()},
        {spec.name: _cuts(spec.name, outputs[spec.name], symbol) for spec in signature.outputs},
    )


def _open(spec: TensorSpec) -> list[int]:
    """The dimensions of a row that are open."""
    return [axis for axis, size in enumerate(spec.shape[1:]) if size < 0]


def _cuts(name: str, shape: Sequence[object], symbol: str) -> tuple[int, ...]:
    for size in shape[1:]:
        if not isinstance(size, int) and size != symbol:
            raise LoadFailed(
                f"output {name} has the open dimension {size}, which is not {symbol} of the padded inputs"
            )
    return tuple(axis for axis, size in enumerate(shape[1:]) if size == symbol)


def _value(spec: TensorSpec, text: str) -> bytes:
    """One element with the declared value."""
    dtype = NUMPY_TYPES.get(spec.datatype)
    kind = datatype_name(spec.datatype)
    if dtype is None or spec.datatype == DataType.DATA_TYPE_BF16:
        raise LoadFailed(f"{_PREFIX}{spec.name}: {kind} cannot be padded")
    try:
        number = float(text) if dtype.kind == "f" else int(text)
        element = np.array(number, dtype)  # raises where an integer is out of range
    except (ValueError, OverflowError) as error:
        raise LoadFailed(f"{_PREFIX}{spec.name} = {text!r} is no {kind}") from error
    return element.tobytes()
