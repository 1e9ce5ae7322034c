"""The most common request, decided as far as the signature allows before it comes: rows of numbers for a
model's one input, and the answer for one row.

A request is bytes that stand around its packed numbers, for protobuf messages may be written one after the
other; an answer is text that stands around its printed numbers. Everything else, and everything that is
wrong, is None here and goes the way of `native`, which gives the same answers (tests hold the two against
each other) and finds the words for what is wrong.
"""

from __future__ import annotations

import enum
import struct
from math import prod
from typing import Any

import numpy as np
import orjson
from headrace.v1.dataplane_pb2 import PredictRequest, SealedReply
from headrace.v1.tensor_pb2 import Tensor
from numpy.typing import NDArray

from services.common.frames.detached import LARGE_BYTES, Buffer
from services.gateway.codecs.numbers import packed_rows
from services.gateway.signature import InputSpec, ModelSignature, OutputSpec

#: The line that says what JSON is.
JSON = b"content-type: application/json\r\n"
#: Tags of PredictRequest: inputs (4), request_id (5, with its length), unit (6), received_at_us (12).
_INPUTS, _REQUEST_ID, _RECEIVED_AT = b"\x22", b"\x2a\x10", b"\x61"
UNITS = tuple(bytes((0x32, size)) for size in range(128))
#: Tag of Tensor's data (4).
_DATA = b"\x22"
_TAIL = struct.Struct("<2s16scQ")
_REMEMBERED_ROWS = 256

# Looked up once: these run for every answer.
_frombuffer, _dumps, _NUMPY = np.frombuffer, orjson.dumps, orjson.OPT_SERIALIZE_NUMPY


class RowsRequest:
    """Requests of one key to one model. `spec` takes rows of a fixed number of floats; `row` packs one where
    it is a list of them."""

    __slots__ = (
        "_constant",
        "_heads",
        "_one",
        "_one_head",
        "_row",
        "_row_bytes",
        "_rows_allowed",
        "_spec",
    )

    def __init__(self, spec: InputSpec, row: struct.Struct | None, model: str, key_id: str) -> None:
        self._spec = spec
        self._row = row
        self._row_bytes = prod(spec.shape[1:]) * spec.datatype.itemsize
        self._rows_allowed = spec.shape[0]
        self._constant = PredictRequest(model=model, key_id=key_id).SerializeToString()
        self._heads: dict[int, bytes] = {}
        self._one = struct.Struct((row.format if row is not None else "<") + "2s16scQ")
        self._one_head = (
            self._constant + self._head(1) if row is not None and spec.shape[0] in (-1, 1) else b""
        )

    def serialized(
        self, rows: list[list[float]], request_id: bytes, received_at_us: int, user_id: str | int | None
    ) -> bytes | None:
        """The request, without what its frame adds; None where rows or user do not fit."""
        row = self._row
        try:
            if len(rows) == 1 and self._one_head:
                # The row and what follows it, in one go.
                packed = self._one.pack(*rows[0], _REQUEST_ID, request_id, _RECEIVED_AT, received_at_us)
                request = self._one_head + packed
            elif row is not None and rows and self._rows_allowed in (-1, len(rows)):
                pack = row.pack
                parts = [pack(*one) for one in rows]
                tail = _TAIL.pack(_REQUEST_ID, request_id, _RECEIVED_AT, received_at_us)
                request = b"".join((self._constant, self._head_of(len(rows)), *parts, tail))
            else:
                return None
        except (struct.error, OverflowError):
            return None
        return _with_unit(request, user_id)

    def packed(
        self,
        text: bytes,
        start: int,
        end: int,
        request_id: bytes,
        received_at_us: int,
        user_id: str | int | None,
    ) -> tuple[bytes, tuple[Buffer, ...] | None, int] | None:
        """The same of the rows that `text[start:end]` lists, what of them stands apart before it, and how
        many they are."""
        spec = self._spec
        found = packed_rows(spec.datatype, spec.shape, text, start, end)
        if found is None:
            return None
        rows, data = found
        tail = _TAIL.pack(_REQUEST_ID, request_id, _RECEIVED_AT, received_at_us)
        head = self._head_of(rows)
        large = len(data) >= LARGE_BYTES
        request = _with_unit(
            b"".join((self._constant, tail) if large else (self._constant, head, data, tail)), user_id
        )
        if request is None:
            return None
        return request, (head, data) if large else None, rows

    def _head_of(self, rows: int) -> bytes:
        head = self._heads.get(rows)
        if head is None:
            if len(self._heads) >= _REMEMBERED_ROWS:
                self._heads.clear()
            head = self._heads[rows] = self._head(rows)
        return head

    def _head(self, rows: int) -> bytes:
        """What stands before the numbers of `rows` rows."""
        spec, size = self._spec, rows * self._row_bytes
        head = tensor_head(spec.name, spec.datatype.number, (rows, *spec.shape[1:]), size)
        return _INPUTS + varint(len(head) + size) + head


def _with_unit(request: bytes, user_id: str | int | None) -> bytes | None:
    """`request` for its user; None where the name is long."""
    if user_id is None:
        return request
    unit = str(user_id).encode()
    return request + UNITS[len(unit)] + unit if len(unit) < len(UNITS) else None


def compile_request(signature: ModelSignature, model: str, key_id: str) -> RowsRequest | None:
    """For models of one input that takes rows of a fixed number of floats; None for others."""
    spec = signature.inputs[0]
    if len(signature.inputs) != 1 or spec.datatype.python is not float or not spec.datatype.code:
        return None
    if len(spec.shape) < 2 or min(spec.shape[1:]) < 1:
        return None
    return RowsRequest(spec, spec.row, model, key_id)


class _Printed:
    """One output of one row: the bytes that precede its numbers, and how these are read."""

    __slots__ = ("at", "count", "dtype", "head", "label", "member", "unpack")

    def __init__(self, spec: OutputSpec, dtype: np.dtype[np.generic]) -> None:
        shape = (1, *spec.shape[1:])
        self.count = shape[1] if len(shape) == 2 else 1
        size = self.count * dtype.itemsize
        self.head = tensor_head(spec.name, spec.datatype.number, shape, size)
        self.at = len(self.head)
        self.dtype = dtype
        #: A single integer, printed without numpy.
        self.label = self.count == 1 and dtype.kind in "iu"
        self.unpack = struct.Struct(f"<{self.count}{spec.datatype.code}").unpack_from
        #: Name and brackets around the numbers.
        self.member = orjson.dumps(spec.name).replace(b"%", b"%%") + (
            b":[[%b]]" if len(shape) == 2 else b":[%b]"
        )


class _How(enum.Enum):
    """How an answer's prediction comes from the outputs."""

    PRINTED = enum.auto()
    PRINTED_VECTOR = enum.auto()
    LABEL = enum.auto()
    MOST_LIKELY = enum.auto()


class RowAnswer:
    """The text of answers of one version to one row; see `native_result` for what stands where."""

    __slots__ = ("_classes", "_how", "_many", "_outputs", "_prediction", "_probable", "_single")

    def __init__(
        self, said: dict[str, str], signature: ModelSignature, outputs: tuple[_Printed, ...]
    ) -> None:
        """`said`: who answers, in members that have a value."""
        self._outputs = outputs
        names = [spec.name for spec in signature.outputs]
        at = names.index(signature.prediction)
        #: Where the text of an output stands.
        self._prediction = at + 2
        classifier = signature.is_classifier
        probable = signature.probabilities if classifier else ""
        self._probable = names.index(probable) if probable in names else -1
        self._classes = tuple(orjson.dumps(name) for name in signature.classes) if classifier else ()
        if at == self._probable:
            self._how = _How.MOST_LIKELY
        elif self._classes and outputs[at].label:
            self._how = _How.LABEL
        else:
            self._how = _How.PRINTED_VECTOR if outputs[at].count > 1 else _How.PRINTED
        self._single = self._text_around(said, b"%b", b"%b")
        self._many = self._text_around(said, b"[%b]", b"[%b]")

    def _text_around(self, said: dict[str, str], prediction: bytes, confidence: bytes) -> bytes:
        """A format of request id, prediction, each output, confidence where there is one, cached, latency."""
        members = b",".join(output.member for output in self._outputs)
        confidence = b',"confidence":' + confidence if self._probable >= 0 else b""
        described = orjson.dumps(said)[1:-1].replace(b"%", b"%%")
        head = b'{"request_id":"%b",' + described + b',"prediction":' + prediction
        return head + b',"outputs":{' + members + b"}" + confidence + b',"cached":%b,"latency_ms":%.3f}'

    def text(self, reply: SealedReply, request_id: bytes, latency_ms: float, *, single: bool) -> bytes | None:
        """The body for `reply`; `request_id` is its text. None where the reply is of another form."""
        sealed = reply.outputs[:]
        outputs = self._outputs
        if len(sealed) != len(outputs) or reply.fallback:
            return None
        texts = [request_id, b""]
        for tensor, output in zip(sealed, outputs):  # noqa: B905 - checked above; saying so costs a tenth
            at = output.at
            if tensor[:at] != output.head:
                return None
            if output.label:
                texts.append(b"%d" % output.unpack(tensor, at)[0])
            else:
                numbers: NDArray[Any] = _frombuffer(tensor, output.dtype, output.count, at)
                texts.append(_dumps(numbers, None, _NUMPY)[1:-1])
        label = 0
        at = self._probable
        if at >= 0:
            output = outputs[at]
            values = output.unpack(sealed[at], output.at)
            label = values.index(max(values))
            texts.append(texts[at + 2].split(b",")[label])
        if self._how is _How.PRINTED:
            texts[1] = texts[self._prediction]
        elif self._how is _How.PRINTED_VECTOR:
            texts[1] = b"[%b]" % texts[self._prediction]
        else:
            if self._how is _How.LABEL:
                label = int(texts[self._prediction])
            elif b"null" in texts[self._prediction]:
                return None  # not numbers, among which the largest is found in another way
            texts[1] = self._classes[label] if 0 <= label < len(self._classes) else b"%d" % label
        texts.append(b"true" if reply.cached else b"false")
        return (self._single if single else self._many) % (*texts, latency_ms)


def compile_answer(
    model: str, version: str, variant: str, signature: ModelSignature, experiment: str = ""
) -> RowAnswer | None:
    """For versions whose outputs are a number or a vector of numbers per row; None for others."""
    names = [spec.name for spec in signature.outputs]
    if not signature.batched or signature.prediction not in names:
        return None
    outputs = []
    for spec in signature.outputs:
        dtype = spec.datatype.dtype
        width = spec.shape[1] if len(spec.shape) == 2 else 1
        if dtype is None or dtype.kind not in "iuf" or len(spec.shape) not in (1, 2) or width < 1:
            return None
        if signature.is_classifier:
            probable = spec.name == signature.probabilities
            if probable and (width < 2 or dtype.kind != "f"):
                return None
            if not probable and spec.name == signature.prediction and dtype.kind != "f" and width > 1:
                return None  # several labels a row
        outputs.append(_Printed(spec, dtype))
    said = {"model": model, "version": version}
    said |= {name: value for name, value in (("variant", variant), ("experiment", experiment)) if value}
    return RowAnswer(said, signature, tuple(outputs))


def tensor_head(name: str, datatype: int, shape: tuple[int, ...], size: int) -> bytes:
    """A serialized Tensor up to its `size` bytes of data."""
    described = Tensor(name=name, datatype=datatype, shape=shape)  # type: ignore[arg-type]  # a number is one
    return described.SerializeToString() + _DATA + varint(size)


def varint(number: int) -> bytes:
    """As protobuf writes a length."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
