"""Whether two versions said the same: typed comparison of outputs. Pure.

Numbers are compared within a tolerance, labels and texts exactly, and of class scores also whether the same
class comes first, and of many of them whether the same five do. The first dimension counts rows where both
sides have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from headrace.v1.events_pb2 import OutputComparison, ShadowVerdict
from headrace.v1.tensor_pb2 import Code, DataType, Tensor
from numpy.typing import NDArray

from services.common.errors import InvalidArgument
from services.common.tensors import to_array

#: Larger outputs are not compared: what a shadow costs stays small.
MAX_BYTES: Final = 1 << 20
#: The first so many of a ranking are compared as a set.
TOP: Final = 5
_FLOATS: Final = frozenset({DataType.DATA_TYPE_FP16, DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_FP64})

Kind = OutputComparison.Kind


@dataclass(frozen=True, slots=True)
class Output:
    """One output of one request. `same` has one entry per row."""

    kind: Kind
    same: NDArray[np.bool_]
    largest: float = 0.0
    mean: float = 0.0
    same_top: int = 0
    #: Elements of a row, and of those with more than `TOP` the rows whose largest ones are the same.
    width: int = 0
    same_top_five: int = 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One request."""

    verdict: ShadowVerdict
    rows: int = 0
    rows_equal: int = 0
    outputs: dict[str, Output] = field(default_factory=dict)


def compare(
    code: Code,
    outputs: Sequence[Tensor],
    shadow_code: Code,
    shadow_outputs: Sequence[Tensor],
    tolerance: float,
) -> Comparison:
    """What the caller got beside what the shadow gave. Raises nothing: nonsense is incomparable."""
    if code != Code.CODE_OK or shadow_code != Code.CODE_OK:
        same = code == shadow_code
        return Comparison(ShadowVerdict.SHADOW_VERDICT_EQUAL if same else ShadowVerdict.SHADOW_VERDICT_FAILED)
    theirs = {tensor.name: tensor for tensor in shadow_outputs}
    if [t.name for t in outputs if t.name not in theirs] or len(theirs) != len(outputs):
        return Comparison(ShadowVerdict.SHADOW_VERDICT_INCOMPARABLE)
    if sum(len(tensor.data) for tensor in outputs) > MAX_BYTES:
        return Comparison(ShadowVerdict.SHADOW_VERDICT_INCOMPARABLE)
    compared: dict[str, Output] = {}
    for tensor in outputs:
        other = theirs[tensor.name]
        if tensor.datatype != other.datatype or tensor.shape != other.shape:
            return Comparison(ShadowVerdict.SHADOW_VERDICT_INCOMPARABLE)
        try:
            compared[tensor.name] = _output(tensor, other, tolerance)
        except InvalidArgument:
            return Comparison(ShadowVerdict.SHADOW_VERDICT_INCOMPARABLE)
    counts = {len(output.same) for output in compared.values()}
    if len(counts) != 1:
        return Comparison(ShadowVerdict.SHADOW_VERDICT_INCOMPARABLE)
    equal = int(np.logical_and.reduce([output.same for output in compared.values()]).sum())
    (rows,) = counts
    alike = equal == rows
    return Comparison(
        ShadowVerdict.SHADOW_VERDICT_EQUAL if alike else ShadowVerdict.SHADOW_VERDICT_DIFFERENT,
        rows,
        equal,
        compared,
    )


def _output(tensor: Tensor, other: Tensor, tolerance: float) -> Output:
    ours, theirs = (to_array(one.data, one.datatype, one.shape) for one in (tensor, other))
    rows = ours.shape[0] if ours.ndim else 1
    width = ours.size // rows if rows else 0
    ours, theirs = ours.reshape(rows, width), theirs.reshape(rows, width)
    if tensor.datatype not in _FLOATS:
        text = tensor.datatype == DataType.DATA_TYPE_BYTES
        agree: NDArray[np.bool_] = np.logical_and.reduce(ours == theirs, axis=1, dtype=np.bool_)
        return Output(Kind.KIND_TEXT if text else Kind.KIND_LABEL, agree)
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
        identical = (a == b) | (np.isnan(a) & np.isnan(b))
        close = identical | (difference <= tolerance * np.maximum(1.0, np.abs(a)))
    difference = np.where(identical, 0.0, difference)
    # A number beside NaN or infinity has no distance: it makes the row different, not the mean.
    finite = difference[np.isfinite(difference)]
    return Output(
        Kind.KIND_NUMBER,
        close.all(axis=1),
        float(finite.max(initial=0.0)),
        float(finite.mean()) if finite.size else 0.0,
        int((a.argmax(axis=1) == b.argmax(axis=1)).sum()) if width > 1 else 0,
        width,
        int((_same_first(a, b) | identical.all(axis=1)).sum()) if width > TOP else 0,
    )


def _same_first(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Per row, whether the `TOP` largest of `a` are so of `b`, too, or as large as the last of those."""
    firsts = np.argpartition(a, -TOP, axis=1)[:, -TOP:]
    least = np.partition(b, -TOP, axis=1)[:, -TOP]
    agree: NDArray[np.bool_] = np.logical_and.reduce(
        np.take_along_axis(b, firsts, axis=1) >= least[:, None], axis=1, dtype=np.bool_
    )
    return agree
