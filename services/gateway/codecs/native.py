"""Bodies of the native routes: `/v1/predict` and `/v1/embed`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import orjson
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Task, Tensor

from services.common.errors import InvalidArgument
from services.common.targeting import MAX_UNIT
from services.gateway.codecs.attributes import fill_attributes, session_of
from services.gateway.codecs.priority import priority_of
from services.gateway.codecs.results import array_of, native_result, nested
from services.gateway.codecs.rows import tensors_of_input, tensors_of_inputs
from services.gateway.codecs.tensors import PARSE_ERRORS, malformed
from services.gateway.datatypes import BYTES
from services.gateway.signature import ModelSignature

#: Stands for a member that is not there.
ABSENT = msgspec.Raw(b"")


class PredictBody(msgspec.Struct, forbid_unknown_fields=True):
    """`inputs` or `input` (one row); the rest is optional, `model` only where the path names it."""

    model: str = ""
    inputs: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT
    user_id: str | int | None = None
    session_id: str | int | None = None
    attributes: dict[str, Any] | None = None
    version: str | int | None = None
    outputs: list[str] | None = None
    priority: str | None = None


_body = msgspec.json.Decoder(PredictBody)
_AT = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_MOST_SHOWN = 256
_MISSING = re.compile(r"missing required field `([^`]*)`")


def decode_body(raw: bytes | bytearray) -> PredictBody:
    """The outer object; inputs stay raw until the model is known. Raises InvalidArgument or MalformedBody."""
    try:
        return _body.decode(raw)
    except msgspec.ValidationError as error:
        raise wrong_field(error) from None
    except PARSE_ERRORS as error:
        raise malformed(error) from None


def wrong_field(error: msgspec.ValidationError, body: type[msgspec.Struct] = PredictBody) -> InvalidArgument:
    """msgspec's finding as ours, with the field of `body` it is about, and the words it takes."""
    text = str(error)
    at = _AT.search(text)
    named = _UNKNOWN.search(text) or _MISSING.search(text)
    sentence = _shown(_AT.sub("", text))
    path = [part for part in (at[1] if at else "", named[1] if named else "") if part]
    field = _shown(".".join(path).replace(".[", "[")) or None
    if field and text.startswith("Invalid enum value"):
        words = ", ".join(filter(None, _words(get_type_hints(body).get(field.partition("[")[0]))))
        sentence += f"; it is one of {words}" if words else ""
    return InvalidArgument(f"{field}: {sentence}." if field else f"{sentence}.", field=field)


def _words(hint: Any) -> list[str]:
    """What the literals in an annotation allow."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [word for inner in get_args(hint) for word in _words(inner)]


def _shown(said: str) -> str:
    """What msgspec repeats of a body, which may be all of it."""
    return said if len(said) <= _MOST_SHOWN else f"{said[:_MOST_SHOWN]}…"


def unit_of(user_id: str | int | None) -> str:
    """The experiment unit that `user_id` names."""
    unit = "" if user_id is None else str(user_id)
    if len(unit) > MAX_UNIT:
        raise InvalidArgument(f"user_id is longer than {MAX_UNIT} characters.", field="user_id")
    return unit


def fill_request(request: PredictRequest, signature: ModelSignature, body: PredictBody) -> bool:
    """Put inputs, who asks, and outputs into `request`; True where the body had the single `input`."""
    single, tensors = inputs_of(signature, body)
    request.inputs.extend(tensors)
    if body.user_id is not None:
        request.unit = unit_of(body.user_id)
    if body.session_id is not None:
        request.session = session_of(body.session_id)
    if body.attributes:
        fill_attributes(request, body.attributes)
    if body.outputs:
        check_outputs(signature, body.outputs)
        request.outputs.extend(body.outputs)
    if body.priority is not None:
        request.priority = priority_of(body.priority, "priority")
    return single


def inputs_of(signature: ModelSignature, body: PredictBody) -> tuple[bool, list[Tensor]]:
    """Whether the body had the single `input`, and its tensors."""
    if body.input is not ABSENT:
        if body.inputs is not ABSENT:
            raise InvalidArgument("Send inputs or input, not both.", field="input")
        return True, tensors_of_input(signature, body.input)
    if body.inputs is ABSENT:
        raise InvalidArgument("inputs is missing.", field="inputs")
    return False, tensors_of_inputs(signature, body.inputs)


def check_outputs(signature: ModelSignature, names: Sequence[str]) -> None:
    """Raise InvalidArgument for a name that is no output of the model."""
    for index, name in enumerate(names):
        if name not in signature.output_names:
            listed = ", ".join(sorted(signature.output_names))
            raise InvalidArgument(
                f"outputs[{index}]: the model has no output {name[:64]!r}; it gives {listed}.",
                field=f"outputs[{index}]",
            )


def encode_answer(
    request_id: str,
    model: str,
    signature: ModelSignature,
    reply: PredictReply,
    *,
    single: bool,
    latency_ms: float,
) -> bytes:
    """The JSON answer of a predict route."""
    prediction, outputs, confidence = native_result(signature, reply.outputs, single=single)
    if isinstance(prediction, np.ndarray) and prediction is outputs.get(signature.prediction):
        # It stands there twice, and printing numbers is most of the work.
        prediction = orjson.Fragment(orjson.dumps(prediction, option=orjson.OPT_SERIALIZE_NUMPY))
        outputs = {**outputs, signature.prediction: prediction}
    answer: dict[str, Any] = {"request_id": request_id, "model": model, "version": reply.version}
    if reply.variant:
        answer["variant"] = reply.variant
    if reply.experiment:
        answer["experiment"] = reply.experiment
    answer["prediction"] = prediction
    answer["outputs"] = outputs
    if confidence is not None:
        answer["confidence"] = confidence
    answer["cached"] = reply.cached
    if reply.fallback:
        answer["fallback"] = True
    answer["latency_ms"] = round(latency_ms, 3)
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def require_embedding(signature: ModelSignature, model: str) -> None:
    """Raise InvalidArgument where the model does not turn texts into vectors."""
    fits = (
        signature.task == Task.TASK_EMBEDDING
        and len(signature.inputs) == 1
        and signature.inputs[0].datatype is BYTES
    )
    if not fits:
        raise InvalidArgument(f"{model} does not embed texts.", field="model")


def encode_embeddings(
    request_id: str, model: str, signature: ModelSignature, reply: PredictReply, latency_ms: float
) -> bytes:
    """The JSON answer of `/v1/embed`: one vector per text."""
    found = next(
        (tensor for tensor in reply.outputs if tensor.name == signature.prediction), reply.outputs[0]
    )
    vectors = array_of(found)
    answer = {
        "request_id": request_id,
        "model": model,
        "version": reply.version,
        "embeddings": nested(vectors),
        "dimensions": int(vectors.shape[-1]),
        "cached": reply.cached,
        "latency_ms": round(latency_ms, 3),
    }
    if reply.fallback:
        answer["fallback"] = True
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
