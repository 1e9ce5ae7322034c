"""Answers of the Open Inference Protocol over REST that are like one before, but for numbers and id: what
`v2.encode_answer` wrote once is kept around them. Both give the same bytes: tests hold them side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
from headrace.v1.dataplane_pb2 import PredictReply, SealedReply
from numpy.typing import NDArray

from services.gateway.codecs.compiled import tensor_head
from services.gateway.codecs.v2 import V2State, answer_parameters, is_binary
from services.gateway.datatypes import BY_NUMBER

# Looked up once: these run for every answer.
_frombuffer, _dumps, _NUMPY = np.frombuffer, orjson.dumps, orjson.OPT_SERIALIZE_NUMPY


class _Output:
    """One output: the bytes that its tensor begins with, and what the answer says of it."""

    __slots__ = ("at", "begin", "count", "dtype", "end", "head", "size")

    def __init__(self, head: bytes, size: int, begin: bytes, end: bytes, dtype: np.dtype[Any] | None) -> None:
        self.head = head
        self.at = len(head)
        self.size = len(head) + size
        #: What the answer says before its numbers and after them.
        self.begin = begin
        self.end = end
        #: Of its numbers, where they are printed; None: their bytes follow the JSON.
        self.dtype = dtype
        self.count = size // dtype.itemsize if dtype is not None else 0


class AnswerForm:
    """Answers of one version whose outputs have the sizes of one before, to requests that want the same
    outputs as bytes."""

    __slots__ = ("_begin", "_end", "_outputs")

    def __init__(self, model: str, reply: PredictReply, outputs: tuple[_Output, ...]) -> None:
        said = {"model_name": model, "model_version": reply.version}
        self._begin = orjson.dumps(said)[:-1] + b',"id":'
        parameters = answer_parameters(reply)
        self._end = b"]" + (b',"parameters":' + orjson.dumps(parameters) if parameters else b"") + b"}"
        self._outputs = outputs

    def body(self, reply: SealedReply, request_id: str) -> tuple[bytes, int | None] | None:
        """The body, and the length of its JSON part where bytes follow it; None where the outputs of `reply`
        have another form."""
        sealed = reply.outputs[:]
        outputs = self._outputs
        if len(sealed) != len(outputs):
            return None
        parts = [self._begin, _dumps(request_id)]
        blobs: list[bytes] = []
        for tensor, output in zip(sealed, outputs, strict=True):
            at = output.at
            if len(tensor) != output.size or not tensor.startswith(output.head):
                return None
            parts.append(output.begin)
            if output.dtype is None:
                blobs.append(tensor[at:])
            else:
                numbers: NDArray[Any] = _frombuffer(tensor, output.dtype, output.count, at)
                parts.append(_dumps(numbers, None, _NUMPY))
            parts.append(output.end)
        parts.append(self._end)
        text = b"".join(parts)
        if not blobs:
            return text, None
        return b"".join((text, *blobs)), len(text)


def answer_form(model: str, state: V2State, reply: PredictReply) -> AnswerForm | None:
    """The form of `reply` to a request of `state`; None where it says something of one request alone, or has
    outputs that are no numbers."""
    if reply.cached or reply.fallback or reply.parameters or not reply.outputs:
        return None
    for tensor in reply.outputs:
        datatype = BY_NUMBER.get(tensor.datatype)
        if datatype is None or not datatype.itemsize or not tensor.data:
            return None
    return AnswerForm(model, reply, tuple(_outputs(state, reply)))


def _outputs(state: V2State, reply: PredictReply) -> Iterator[_Output]:
    for index, tensor in enumerate(reply.outputs):
        datatype = BY_NUMBER[tensor.datatype]
        shape = list(tensor.shape)
        said: dict[str, Any] = {"name": tensor.name, "datatype": datatype.name, "shape": shape}
        size = len(tensor.data)
        head = tensor_head(tensor.name, tensor.datatype, tuple(shape), size)
        before = b"," if index else b',"outputs":['
        if is_binary(state, tensor):
            said["parameters"] = {"binary_data_size": size}
            yield _Output(head, size, before + orjson.dumps(said), b"", None)
        else:
            yield _Output(head, size, before + orjson.dumps(said)[:-1] + b',"data":', b"}", datatype.dtype)
