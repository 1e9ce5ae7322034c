"""Bodies of the Open Inference Protocol V2 over REST, as JSON and with binary tensors."""

from __future__ import annotations

from math import prod
from typing import Any

import msgspec
import orjson
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Tensor

from services.common.errors import InvalidArgument
from services.common.frames.detached import Buffer
from services.gateway.codecs.attributes import parameter, session_of
from services.gateway.codecs.compiled import JSON, varint
from services.gateway.codecs.native import wrong_field
from services.gateway.codecs.places import REGION, Find, OutputPlaces, Scalar, find_none, input_in, place_of
from services.gateway.codecs.priority import priority_of_parameter
from services.gateway.codecs.results import array_of, bytes_elements
from services.gateway.codecs.rows import check_shape, tensor_from_nested_or_flat
from services.gateway.codecs.tensors import PARSE_ERRORS, malformed
from services.gateway.codecs.v2_lists import LONG_BODY_BYTES, cut_out, stand_in
from services.gateway.datatypes import BF16, BY_NUMBER, BYTES
from services.gateway.signature import InputSpec, ModelSignature

_ABSENT = msgspec.Raw(b"")


class V2Input(msgspec.Struct):
    """One input tensor; `data` is absent where its bytes follow the JSON."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Scalar] | None = None
    data: msgspec.Raw = _ABSENT


class V2Output(msgspec.Struct):
    """One output asked for."""

    name: str
    parameters: dict[str, Scalar] | None = None


class V2Request(msgspec.Struct):
    """An inference request."""

    inputs: list[V2Input]
    id: str = ""
    parameters: dict[str, Scalar] | None = None
    outputs: list[V2Output] | None = None


class V2State(msgspec.Struct):
    """What the answer must know of its request. `binary` names the outputs wanted as bytes, None: all. Beside
    the id, `V2Plan` tells answers apart by what stands here."""

    id: str
    binary: frozenset[str] | None


_request = msgspec.json.Decoder(V2Request)

#: Parameters that the gateway itself acts on; the others go with the request.
_OURS = frozenset({
    "binary_data_output", "binary_data_size", "user_id", "timeout",
    # Asks for a last message of models that answer a request by several; each of ours answers by one.
    "triton_enable_empty_final_response",
})  # fmt: skip
#: Binary inputs of so many bytes are not copied.
LARGE_BYTES = 32 << 10
#: Tags of PredictRequest's inputs (4) and of Tensor's data (4).
_INPUTS, _DATA = b"\x22", b"\x22"
_LENGTH_DIGITS = 12
_BINARY = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n"


def decode_request(body: bytes | bytearray, json_length: bytes | None) -> tuple[V2Request, memoryview]:
    """The JSON part, and the raw tensors behind it (empty for a body that is JSON as a whole). `json_length`
    is the header Inference-Header-Content-Length."""
    view = memoryview(body)
    length = json_end(body, json_length)
    if length < 0:
        raise InvalidArgument(
            "Inference-Header-Content-Length does not fit the body.", field="Inference-Header-Content-Length"
        )
    asked = _parse_long(body, length) if length >= LONG_BODY_BYTES and type(body) is bytes else None
    return asked or parse_request(view[:length]), view[length:]


def _parse_long(body: bytes, end: int) -> V2Request | None:
    """The JSON `body[:end]`, if lists of numbers make it long; None for whatever else it is."""
    found = cut_out(body, end)
    if found is None:
        return None
    rest, lists = found
    try:
        asked = _request.decode(rest)
    except (msgspec.ValidationError, *PARSE_ERRORS):
        return None
    given = [one for one in asked.inputs if one.data is not _ABSENT]
    if [bytes(one.data) for one in given] != [stand_in(number) for number in range(len(lists))]:
        return None
    for one, numbers in zip(given, lists, strict=True):
        one.data = msgspec.Raw(numbers)
    return asked


def json_end(body: bytes | bytearray, json_length: bytes | None) -> int:
    """Where the JSON part of `body` ends; -1 where the header that says it does not fit."""
    if json_length is None:
        return len(body)
    length = int(json_length) if json_length.isdigit() and len(json_length) < _LENGTH_DIGITS else -1
    return length if length <= len(body) else -1


def raw_request(signature: ModelSignature, body: bytes | bytearray) -> tuple[V2Request, memoryview]:
    """The same of a body without JSON (its length is 0): the bytes of the model's one input, a text being one
    element and without its length. Outputs are wanted as bytes. Raises InvalidArgument where they do not say
    the shape."""
    spec = signature.inputs[0]
    if len(signature.inputs) > 1:
        raise InvalidArgument(
            f"Without JSON a model has one input; this takes {', '.join(signature.by_name)}.",
            field="Inference-Header-Content-Length",
        )
    variable = [axis for axis, size in enumerate(spec.shape) if size < 0]
    shape = [max(size, 1) for size in spec.shape]
    if spec.datatype is BYTES:
        body = len(body).to_bytes(4, "little") + body
    elif variable:
        if signature.batched and len(variable) > 1:
            variable = [axis for axis in variable if axis]  # of one row
        if len(variable) > 1:
            where = f"inputs.{spec.name}"
            raise InvalidArgument(f"{where} needs a shape for {list(spec.shape)}.", field=where)
        shape[variable[0]] = max(1, len(body) // (prod(shape) * spec.datatype.itemsize))
    given = V2Input(spec.name, shape, spec.datatype.name, {"binary_data_size": len(body)})
    return V2Request([given], parameters={"binary_data_output": True}), memoryview(body)


def parse_request(text: bytes | memoryview) -> V2Request:
    """The JSON part. Raises InvalidArgument or MalformedBody."""
    try:
        return _request.decode(text)
    except msgspec.ValidationError as error:
        raise wrong_field(error) from None
    except PARSE_ERRORS as error:
        raise malformed(error) from None


def fill_request(
    request: PredictRequest,
    signature: ModelSignature,
    asked: V2Request,
    binary: memoryview,
    apart: list[Buffer] | None = None,
    find: Find = find_none,
) -> V2State:
    """Put inputs, outputs and parameters into `request`; `find` gives regions of shared memory. Raises
    InvalidArgument naming `inputs.<name>`.

    Large binary inputs are put into `apart` instead, where it is given: fields of the request, with the data
    as a view of `binary`."""
    given: dict[str, Tensor] = {}
    stays: set[str] = set()
    for one in asked.inputs:
        where = f"inputs.{one.name}"
        spec = signature.by_name.get(one.name)
        if spec is None:
            raise InvalidArgument(
                f"{where} is no input of this model, which takes {', '.join(signature.by_name)}.", field=where
            )
        if one.name in given:
            raise InvalidArgument(f"{where} is given twice.", field=where)
        check_declared(spec, one.datatype, one.shape, where)
        if one.parameters and REGION in one.parameters:
            given[one.name] = _elsewhere(one, one.parameters, spec, find, where)
            continue
        size = _binary_size(one, binary, where)
        if size is None:
            given[one.name] = tensor_from_nested_or_flat(spec, one.data, one.shape, where)
            continue
        if apart is not None and size >= LARGE_BYTES and spec.datatype is not BYTES:
            check_size(spec, one.shape, size, where)
            given[one.name] = tensor = Tensor(name=spec.name, datatype=spec.datatype.number, shape=one.shape)
            stays.add(one.name)
            head = tensor.SerializeToString() + _DATA + varint(size)
            apart += (_INPUTS + varint(len(head) + size) + head, binary[:size])
        else:
            given[one.name] = raw_tensor(spec, one.shape, bytes(binary[:size]), where)
        binary = binary[size:]
    if len(binary):
        raise InvalidArgument(f"{len(binary)} bytes follow the tensors that the JSON part announces.")
    for spec in signature.inputs:
        if spec.name not in given:
            raise InvalidArgument(f"inputs.{spec.name} is missing.", field=f"inputs.{spec.name}")
    tensors = [given[spec.name] for spec in signature.inputs]
    check_rows(signature, tensors)
    request.inputs.extend([tensor for tensor in tensors if tensor.name not in stays] if stays else tensors)
    fill_parameters(request, asked.parameters)
    fill_outputs(request, signature, [one.name for one in asked.outputs or ()])
    return V2State(asked.id, _binary_outputs(signature, asked))


def _elsewhere(
    one: V2Input, parameters: dict[str, Scalar], spec: InputSpec, find: Find, where: str
) -> Tensor:
    """The input whose data lies in shared memory, by its `parameters`."""
    if one.data is not _ABSENT or "binary_data_size" in parameters:
        raise InvalidArgument(f"{where} has data beside its shared memory.", field=where)
    return input_in(place_of(parameters, find, where), spec, one.shape, where)


def check_rows(signature: ModelSignature, tensors: list[Tensor]) -> None:
    """Raise InvalidArgument where the inputs of a batched model differ in rows."""
    if signature.batched:
        for tensor in tensors[1:]:
            if tensor.shape[0] != tensors[0].shape[0]:
                where = f"inputs.{tensor.name}"
                raise InvalidArgument(
                    f"{where} has {tensor.shape[0]} rows, {tensors[0].name} has {tensors[0].shape[0]}.",
                    field=where,
                )


def fill_parameters(request: PredictRequest, parameters: dict[str, Scalar] | None) -> None:
    """Pass a request's own parameters on; `user_id` and `session_id` name units of experiments, `priority`
    the class. What experiments target is looked for among the parameters too."""
    for name, value in (parameters or {}).items():
        if name == "user_id":
            if value is not None:  # nobody is said, and must not become a user called None
                request.unit = str(value)[:512]
        elif name == "session_id":
            if value is not None:
                request.session = session_of(str(value), "parameters.session_id")
        elif name == "priority":
            request.priority = priority_of_parameter(value)
        elif name not in _OURS and value is not None:
            request.parameters[name].CopyFrom(parameter(value, f"parameters.{name}"))


def timeout_of(parameters: dict[str, Scalar] | None) -> float:
    """The seconds of the parameter `timeout`, which is in microseconds; 0 where it is absent or 0."""
    value = (parameters or {}).get("timeout") or 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise InvalidArgument(
            "parameters.timeout must be a whole number of microseconds.", field="parameters.timeout"
        )
    return value / 1e6


def fill_outputs(request: PredictRequest, signature: ModelSignature, names: list[str]) -> None:
    """Ask for the outputs `names`; none: all."""
    for name in names:
        if name not in signature.output_names:
            raise InvalidArgument(f"outputs.{name} is no output of this model.", field=f"outputs.{name}")
    request.outputs.extend(names)


def raw_tensor(spec: InputSpec, shape: list[int], data: bytes, where: str) -> Tensor:
    """Raw little-endian bytes as a tensor, once their length fits the shape."""
    count = prod(shape)
    if spec.datatype is BYTES:
        try:
            found = sum(1 for _ in bytes_elements(data))
        except ValueError:
            found = -1
        if found != count:
            raise InvalidArgument(f"{where}: its bytes are not {count} elements with lengths.", field=where)
    else:
        check_size(spec, shape, len(data), where)
    return Tensor(name=spec.name, datatype=spec.datatype.number, shape=shape, data=data)


def check_size(spec: InputSpec, shape: list[int], size: int, where: str) -> None:
    """Raise InvalidArgument where `size` bytes are not what numbers of `shape` take."""
    wanted = prod(shape) * spec.datatype.itemsize
    if size != wanted:
        raise InvalidArgument(f"{where} has {size} bytes where shape {shape} asks for {wanted}.", field=where)


def check_declared(spec: InputSpec, datatype: str, shape: list[int], where: str) -> None:
    """Raise InvalidArgument where what a client declares is not what the signature says."""
    if datatype != spec.datatype.name:
        raise InvalidArgument(
            f"{where} has datatype {datatype[:16]!r} where the model takes {spec.datatype.name}.", field=where
        )
    check_shape(spec, shape, where)


def encode_answer(
    model: str, state: V2State, request_id: str, reply: PredictReply, places: OutputPlaces | None = None
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON part where binary tensors follow it. What belongs into `places` is
    put there. Raises InvalidArgument where that cannot be."""
    elsewhere = places.put(reply.outputs) if places is not None else {}
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for tensor in reply.outputs:
        datatype = BY_NUMBER[tensor.datatype]
        entry: dict[str, Any] = {
            "name": tensor.name,
            "datatype": datatype.name,
            "shape": list(tensor.shape),
        }
        if tensor.name in elsewhere:
            entry["parameters"] = elsewhere[tensor.name]
        elif is_binary(state, tensor):
            entry["parameters"] = {"binary_data_size": len(tensor.data)}
            blobs.append(tensor.data)
        else:
            flat = array_of(tensor).reshape(-1)
            entry["data"] = flat.tolist() if flat.dtype == object else flat
        outputs.append(entry)
    answer: dict[str, Any] = {
        "model_name": model,
        "model_version": reply.version,
        "id": state.id or request_id,
        "outputs": outputs,
    }
    parameters = answer_parameters(reply)
    if parameters:
        answer["parameters"] = parameters
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not blobs:
        return head, None
    return b"".join([head, *blobs]), len(head)


def answer_head(json_length: int | None) -> bytes:
    """The headers of an answer, by the length of its JSON part where binary tensors follow it."""
    return JSON if json_length is None else _BINARY % json_length


def is_binary(state: V2State, tensor: Tensor) -> bool:
    """Whether the answer has the bytes of `tensor` behind its JSON part."""
    binary = state.binary
    return binary is None or tensor.name in binary or tensor.datatype == BF16.number


def answer_parameters(reply: PredictReply) -> dict[str, Scalar]:
    """What an answer says beside its tensors."""
    parameters: dict[str, Scalar] = {}
    for name, value in reply.parameters.items():
        kind = value.WhichOneof("value")
        if kind is not None:
            parameters[name] = getattr(value, kind)
    if reply.variant and (reply.experiment or reply.variant != reply.version):
        parameters["variant"] = reply.variant
    if reply.experiment:
        parameters["experiment"] = reply.experiment
    if reply.cached:
        parameters["cached"] = True
    if reply.fallback:
        parameters["fallback"] = True
    return parameters


def _binary_size(one: V2Input, binary: memoryview, where: str) -> int | None:
    """How many bytes behind the JSON part are those of `one`; None where its data is in the JSON."""
    parameters = one.parameters or {}
    size = parameters.get("binary_data_size")
    if size is None:
        if one.data is _ABSENT:
            raise InvalidArgument(f"{where} has no data.", field=where)
        return None
    if one.data is not _ABSENT:
        raise InvalidArgument(f"{where} has data and binary_data_size.", field=where)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
        raise InvalidArgument(f"{where}: binary_data_size does not fit the body.", field=where)
    return size


def _binary_outputs(signature: ModelSignature, asked: V2Request) -> frozenset[str] | None:
    everything = bool((asked.parameters or {}).get("binary_data_output"))
    if not asked.outputs:
        return None if everything else frozenset()
    return frozenset(
        one.name for one in asked.outputs if (one.parameters or {}).get("binary_data", everything)
    )
