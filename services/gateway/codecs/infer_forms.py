"""ModelInfer messages that are like one before, but for their numbers.

A client writes the same message again and again, and only the numbers in it change. Where these stand
follows from the bytes around them: in protobuf, what is inside of a length-delimited field has no say in how
the rest is read. So a message of the same size with the same bytes around its numbers asks for the same with
other numbers, and needs no parser. What a form stands for is found out by the ordinary way, once; everything
that fits no form takes that way every time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from open_inference.open_inference_pb2 import ModelInferRequest, ModelInferResponse

from services.common.frames.detached import Buffer
from services.gateway.codecs.compiled import tensor_head, varint
from services.gateway.codecs.oip import to_response
from services.gateway.codecs.v2 import LARGE_BYTES
from services.gateway.datatypes import BY_NUMBER
from services.gateway.signature import ModelSignature

#: Tags of ModelInferRequest's names: model (1), version (2), id (3).
_MODEL, _VERSION, _ID = 0x0A, 0x12, 0x1A
#: Tag of its parameters (4), an entry of which, for the user, begins so; then lengths and tag of the text.
_PARAMETER, _USER = 0x22, b"\x0a\x07user_id\x12"
_TEXT = 0x1A
#: Tag of its raw_input_contents (7), and of InferTensorContents' packed fp32 (6) and fp64 (7).
_RAW, _FP32, _FP64 = b"\x3a", b"\x32", b"\x3a"
#: Tag of ModelInferResponse's id (3) and raw_output_contents (6).
_ANSWER_ID, _ANSWER_RAW = b"\x1a", b"\x32"
#: Tags of PredictRequest: inputs (4), request_id (5, with its length), received_at_us (12).
_INPUTS, _REQUEST_ID, _RECEIVED_AT = b"\x22", b"\x2a\x10", b"\x61"
_TAIL = struct.Struct("<2s16scQ")
#: Lengths below take one byte.
_SHORT = 128
#: Numbers that stand for others while a form is tried: the same whatever their width, and no NaN.
_PROBE = b"\x3f"


def named(body: bytes) -> int:
    """Where the names of model and version at the beginning of a message end. Raises IndexError."""
    end = body[1] + 2
    return end + body[end + 1] + 2 if body[end] == _VERSION else end


def id_at(body: bytes, at: int) -> tuple[bytes, int]:
    """The request's id, where it stands at `at` and is plain, and where it ends. Raises IndexError."""
    if body[at] != _ID or (size := body[at + 1]) >= _SHORT:
        return b"", at
    end = at + 2 + size
    found = body[at + 2 : end]
    return (found, end) if found.isascii() else (b"", at)


def user_at(body: bytes, at: int) -> tuple[bytes, int]:
    """The user whom the parameter at `at` names, where it does so plainly, and where it ends. Raises
    IndexError."""
    if body[at] != _PARAMETER or not body.startswith(_USER, at + 2):
        return b"", at
    entry, value, tag, size = body[at + 1], body[at + 12], body[at + 13], body[at + 14]
    end = at + 15 + size
    if entry >= _SHORT or entry != size + 13 or value != size + 2 or tag != _TEXT:
        return b"", at
    found = body[at + 15 : end]
    return (found, end) if found.isascii() else (b"", at)


class RequestForm:
    """Messages whose bytes behind their id and their user are `around[0]`, numbers, `around[1]`, …; `sizes`
    are those of the numbers."""

    __slots__ = (
        "_around",
        "_first",
        "_heads",
        "_last",
        "_one",
        "_order",
        "_sizes",
        "priority",
        "size",
        "timeout_s",
        "used",
    )

    def __init__(
        self,
        around: Sequence[bytes],
        sizes: Sequence[int],
        request: PredictRequest,
        order: Sequence[int],
        timeout_s: float,
    ) -> None:
        """`request` is what one of them asks for; its input number i has the numbers of place `order[i]`."""
        self._around = tuple(around)
        self._first, self._last = self._around[0], self._around[-1]
        self._sizes = tuple(sizes)
        self._order = tuple(order)
        self._one = len(self._sizes) == 1
        self.priority: int = request.priority
        self.timeout_s = timeout_s
        #: Bytes of such a message behind id and user.
        self.size = sum(map(len, self._around)) + sum(self._sizes)
        #: Whether any message fitted.
        self.used = False
        constant = PredictRequest()
        constant.CopyFrom(request)
        for name in ("inputs", "request_id", "received_at_us"):
            constant.ClearField(name)
        heads = []
        for tensor in request.inputs:
            size = len(tensor.data)
            head = tensor_head(tensor.name, tensor.datatype, tuple(tensor.shape), size)
            heads.append(_INPUTS + varint(len(head) + size) + head)
        heads[0] = constant.SerializeToString() + heads[0]
        self._heads = tuple(heads)

    def request(
        self, body: bytes, at: int, request_id: bytes, received_at_us: int
    ) -> tuple[bytes, tuple[Buffer, ...] | None] | None:
        """The PredictRequest for `body`, but its user; the form begins at `at`, and its size fits. None where
        it is of another form. Of a large one the tensors come apart, with views of `body`."""
        if self.size >= LARGE_BYTES:
            return self._apart(body, at, request_id, received_at_us)
        if not body.startswith(self._first, at) or not body.endswith(self._last):
            return None
        tail = _TAIL.pack(_REQUEST_ID, request_id, _RECEIVED_AT, received_at_us)
        if self._one:
            start = at + len(self._first)
            return b"".join((self._heads[0], body[start : start + self._sizes[0]], tail)), None
        numbers = []
        for around, size in zip(self._around, self._sizes, strict=False):  # the last one was compared
            if not body.startswith(around, at):
                return None
            at += len(around)
            numbers.append(body[at : at + size])
            at += size
        parts: list[bytes] = []
        for head, place in zip(self._heads, self._order, strict=True):
            parts += (head, numbers[place])
        parts.append(tail)
        return b"".join(parts), None

    def _apart(
        self, body: bytes, at: int, request_id: bytes, received_at_us: int
    ) -> tuple[bytes, tuple[Buffer, ...]] | None:
        view = memoryview(body)
        numbers = []
        for around, size in zip(self._around, self._sizes, strict=False):
            if not body.startswith(around, at):
                return None
            at += len(around)
            numbers.append(view[at : at + size])
            at += size
        if not body.endswith(self._last):
            return None
        parts: list[Buffer] = []
        for head, place in zip(self._heads, self._order, strict=True):
            parts += (head, numbers[place])
        return _TAIL.pack(_REQUEST_ID, request_id, _RECEIVED_AT, received_at_us), tuple(parts)


def names_of(body: bytes, asked: ModelInferRequest) -> bytes | None:
    """What `body`, which says `asked`, begins with, where that is the names; None where they stand
    elsewhere."""
    names = ModelInferRequest(model_name=asked.model_name, model_version=asked.model_version)
    begin = names.SerializeToString()
    return begin if body.startswith(begin) and len(body) > len(begin) and named(body) == len(begin) else None


def request_form(
    body: bytes,
    names: bytes,
    asked: ModelInferRequest,
    request: PredictRequest,
    signature: ModelSignature,
    timeout_s: float,
) -> RequestForm | None:
    """The form of `body`, which begins with `names`, and which the ordinary way read as `asked` and turned
    into `request`; None where it has none, such as where numbers are no bytes of a fixed size."""
    try:
        found_id, start = id_at(body, len(names))
        user, start = user_at(body, start)
    except IndexError:
        return None
    if found_id.decode() != asked.id:
        return None
    constant = PredictRequest()
    constant.CopyFrom(request)
    rest = ModelInferRequest()
    rest.CopyFrom(asked)
    if user:
        constant.ClearField("unit")
        del rest.parameters["user_id"]
    places = _places(body, start, rest, signature)
    if places is None or not _holds(body, start, rest, places):
        return None
    around, at = [], start
    for begin, end in places:
        around.append(body[at:begin])
        at = end
    around.append(body[at:])
    in_message = [one.name for one in asked.inputs]
    order = [in_message.index(tensor.name) for tensor in request.inputs]
    return RequestForm(around, [end - begin for begin, end in places], constant, order, timeout_s)


def _places(
    body: bytes, at: int, asked: ModelInferRequest, signature: ModelSignature
) -> list[tuple[int, int]] | None:
    """Where the numbers of each input seem to stand."""
    places = []
    for index, one in enumerate(asked.inputs):
        datatype = signature.by_name[one.name].datatype
        if not datatype.itemsize:
            return None
        if asked.raw_input_contents:
            tag, data = _RAW, asked.raw_input_contents[index]
        elif datatype.name == "FP32":
            tag, data = (
                _FP32,
                struct.pack(f"<{len(one.contents.fp32_contents)}f", *one.contents.fp32_contents),
            )
        elif datatype.name == "FP64":
            tag, data = (
                _FP64,
                struct.pack(f"<{len(one.contents.fp64_contents)}d", *one.contents.fp64_contents),
            )
        else:
            return None
        said = tag + varint(len(data))
        found = body.find(said + data, at)
        if not data or found < 0:
            return None
        begin = found + len(said)
        at = begin + len(data)
        places.append((begin, at))
    return places


def _packed(code: str, values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}{code}", *values)


def _holds(body: bytes, start: int, asked: ModelInferRequest, places: list[tuple[int, int]]) -> bool:
    """Whether other bytes at `places` are other numbers of the inputs, and nothing else; and whether the
    names are said once."""
    changed = bytearray(body)
    for begin, end in places:
        changed[begin:end] = _PROBE * (end - begin)
    other = ModelInferRequest.FromString(bytes(changed[start:]))
    if other.model_name or other.model_version or other.id:
        return False
    expected = ModelInferRequest()
    expected.CopyFrom(asked)
    for name in ("model_name", "model_version", "id"):
        expected.ClearField(name)
    for index, (begin, end) in enumerate(places):
        numbers = _PROBE * (end - begin)
        if asked.raw_input_contents:
            expected.raw_input_contents[index] = numbers
        else:
            contents = expected.inputs[index].contents
            for values, code, width in ((contents.fp32_contents, "f", 4), (contents.fp64_contents, "d", 8)):
                if len(values):
                    values[:] = struct.unpack(f"<{(end - begin) // width}{code}", numbers)
    return other == expected


class AnswerForm:
    """Answers of one version whose outputs have the sizes of one before."""

    __slots__ = ("_begin", "_described", "_outputs")

    def __init__(self, model: str, reply: PredictReply) -> None:
        said = to_response(model, "", reply)
        names = ModelInferResponse(model_name=said.model_name, model_version=said.model_version)
        self._begin = names.SerializeToString() + _ANSWER_ID
        for name in ("model_name", "model_version", "raw_output_contents"):
            said.ClearField(name)
        self._described = said.SerializeToString()
        self._outputs = tuple(_outputs(reply))

    def message(self, sealed: Sequence[bytes], request_id: bytes) -> bytes | None:
        """The ModelInferResponse with the outputs of a reply; None where these have another form."""
        outputs = self._outputs
        if len(sealed) != len(outputs):
            return None
        parts = [self._begin, varint(len(request_id)), request_id, self._described]
        for tensor, (head, at, size, begin) in zip(sealed, outputs, strict=True):
            if len(tensor) != size or not tensor.startswith(head):
                return None
            parts += (begin, tensor[at:])
        return b"".join(parts)


def answer_form(model: str, reply: PredictReply) -> AnswerForm | None:
    """The form of `reply`; None where it says something of one request alone, or has outputs of no fixed
    size."""
    if reply.cached or reply.fallback or reply.parameters:
        return None
    for tensor in reply.outputs:
        datatype = BY_NUMBER.get(tensor.datatype)
        if datatype is None or not datatype.itemsize or not tensor.data:
            return None
    return AnswerForm(model, reply)


def _outputs(reply: PredictReply) -> Iterator[tuple[bytes, int, int, bytes]]:
    for tensor in reply.outputs:
        size = len(tensor.data)
        head = tensor_head(tensor.name, tensor.datatype, tuple(tensor.shape), size)
        yield head, len(head), len(head) + size, _ANSWER_RAW + varint(size)
