"""Tensors of a reply to JSON. NaN and the infinities, which JSON does not have, become null."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from headrace.v1.tensor_pb2 import Tensor
from numpy.typing import NDArray

from services.common.errors import Internal
from services.gateway.datatypes import BF16, BY_NUMBER
from services.gateway.signature import ModelSignature

Array = NDArray[Any]

_FEW_ROWS = 8


def array_of(tensor: Tensor) -> Array:
    """The tensor as a numpy array over the message's own bytes; BYTES as an array of str. Raises Internal
    where the peer's shape and bytes disagree."""
    try:
        datatype = BY_NUMBER[tensor.datatype]
        if datatype.dtype is not None:
            return np.ndarray(tensor.shape[:], datatype.dtype, tensor.data)
        if datatype is BF16:
            return widened(np.frombuffer(tensor.data, "<u2")).reshape(tensor.shape)
        elements = [part.decode("utf-8", "replace") for part in bytes_elements(tensor.data)]
        texts = np.empty(len(elements), dtype=object)
        texts[:] = elements
        return np.asarray(texts.reshape(tensor.shape))
    except (KeyError, TypeError, ValueError) as error:
        raise Internal(f"The model's output {tensor.name} is not what its shape says.") from error


def widened(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    """BF16 bit patterns as FP32, exactly: BF16 is the upper half of an FP32."""
    return (halves.astype("<u4") << 16).view("<f4")


def bytes_elements(data: bytes) -> Iterable[bytes]:
    """The elements of raw BYTES. Raises ValueError where a length points past the end."""
    at, end = 0, len(data)
    while at < end:
        begin = at + 4
        at = begin + int.from_bytes(data[at:begin], "little")
        if at > end or begin > end:
            raise ValueError("an element is cut short")
        yield data[begin:at]


def nested(array: Array) -> Any:
    """What orjson writes as nested lists; numbers stay in the array, so that FP32 keeps its short form."""
    if array.dtype == object or array.ndim == 0:
        return array.tolist()
    return array


def native_result(
    signature: ModelSignature, tensors: Iterable[Tensor], *, single: bool
) -> tuple[Any, dict[str, Any], Any]:
    """`prediction`, `outputs` and `confidence` of a native answer.

    `prediction` has one entry per row (class name where the signature has classes; nested lists where a row
    has many values), `confidence` the largest class probability per row, None for models that are no
    classifiers. `single` takes the first row of both.
    """
    return result_of_arrays(signature, {tensor.name: array_of(tensor) for tensor in tensors}, single=single)


def result_of_arrays(
    signature: ModelSignature, arrays: dict[str, Array], *, single: bool
) -> tuple[Any, dict[str, Any], Any]:
    """The same of outputs that are arrays already."""
    outputs: dict[str, Any] = arrays
    for array in arrays.values():
        if array.dtype == object or array.ndim == 0:
            outputs = {name: nested(one) for name, one in arrays.items()}
            break
    answer = arrays.get(signature.prediction)
    if answer is None:  # the caller asked for other outputs only
        return None, outputs, None
    probabilities = arrays.get(signature.probabilities)
    classifier = signature.is_classifier
    prediction: Any
    if classifier and signature.prediction == signature.probabilities:
        prediction = _names(_most_likely(answer), signature.classes)
    elif classifier and signature.classes and answer.dtype.kind in "iub":
        prediction = _names(answer.reshape(-1).tolist(), signature.classes)
    else:
        prediction = nested(_per_row(answer, batched=signature.batched))
    confidence = _confidence(probabilities) if classifier and probabilities is not None else None
    if single and signature.batched and len(answer) == 1:
        prediction = prediction[0]
        confidence = confidence[0] if confidence is not None else None
    return prediction, outputs, confidence


def _per_row(array: Array, *, batched: bool) -> Array:
    """Rows of one element lose the dimension of size 1."""
    if batched and array.ndim > 1 and array.size == len(array):
        return array.reshape(-1)
    return array


def _names(labels: list[int], classes: tuple[str, ...]) -> list[Any]:
    if not classes:
        return labels
    return [classes[label] if 0 <= label < len(classes) else label for label in labels]


def _most_likely(probabilities: Array) -> list[int]:
    if probabilities.ndim < 2 or probabilities.shape[-1] == 1:  # one column: the positive class
        return [int(p >= 0.5) for p in probabilities.reshape(-1).tolist()]
    return probabilities.argmax(axis=-1).reshape(-1).tolist()  # type: ignore[no-any-return]  # numpy's stub


def _confidence(probabilities: Array) -> Array | list[Any]:
    if probabilities.ndim < 2 or probabilities.shape[-1] == 1:
        flat = probabilities.reshape(-1)
        either: Array = np.maximum(flat, 1 - flat)
        return either
    if probabilities.ndim == 2 and len(probabilities) <= _FEW_ROWS:
        # A reduction costs numpy a microsecond to set up; picking keeps the element's own short form.
        rows = probabilities.tolist()
        return [probabilities[at, row.index(max(row))] for at, row in enumerate(rows)]
    best: Array = probabilities.max(axis=-1)
    return best
