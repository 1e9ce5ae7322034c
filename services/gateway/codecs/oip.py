"""ModelInfer messages of the Open Inference Protocol over gRPC to requests and back."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Tensor
from open_inference.open_inference_pb2 import (
    InferParameter,
    InferTensorContents,
    ModelInferRequest,
    ModelInferResponse,
)

from services.common.errors import InvalidArgument
from services.gateway.codecs import v2
from services.gateway.codecs.explain import explain
from services.gateway.codecs.places import REGION, Find, OutputPlaces, Scalar, find_none, input_in, place_of
from services.gateway.codecs.tensors import pack_flat
from services.gateway.datatypes import BY_NUMBER
from services.gateway.signature import InputSpec, ModelSignature

#: The field of InferTensorContents that carries a datatype; FP16 and BF16 travel raw only.
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def fill_request(
    request: PredictRequest, signature: ModelSignature, asked: ModelInferRequest, find: Find = find_none
) -> None:
    """Put inputs, outputs and parameters of `asked` into `request`; `find` gives regions of shared memory.
    Raises InvalidArgument naming `inputs.<name>`."""
    raw = list(asked.raw_input_contents)
    # Inputs in shared memory have no entry there.
    sent = sum(REGION not in one.parameters for one in asked.inputs)
    if raw and len(raw) != sent:
        raise InvalidArgument(
            f"raw_input_contents has {len(raw)} entries for {sent} inputs.", field="raw_input_contents"
        )
    data = iter(raw)
    given: dict[str, Tensor] = {}
    for one in asked.inputs:
        where = f"inputs.{one.name}"
        spec = signature.by_name.get(one.name)
        if spec is None:
            raise InvalidArgument(
                f"{where} is no input of this model, which takes {', '.join(signature.by_name)}.", field=where
            )
        if one.name in given:
            raise InvalidArgument(f"{where} is given twice.", field=where)
        shape = list(one.shape)
        v2.check_declared(spec, one.datatype, shape, where)
        if REGION in one.parameters:
            if one.HasField("contents"):
                raise InvalidArgument(f"{where} has contents beside its shared memory.", field=where)
            given[one.name] = input_in(place_of(scalars(one.parameters), find, where), spec, shape, where)
        elif raw:
            if one.HasField("contents"):
                raise InvalidArgument(f"{where} has contents beside raw_input_contents.", field=where)
            given[one.name] = v2.raw_tensor(spec, shape, next(data), where)
        else:
            given[one.name] = _typed(spec, shape, one.contents, where)
    for spec in signature.inputs:
        if spec.name not in given:
            raise InvalidArgument(f"inputs.{spec.name} is missing.", field=f"inputs.{spec.name}")
    tensors = [given[spec.name] for spec in signature.inputs]
    v2.check_rows(signature, tensors)
    request.inputs.extend(tensors)
    v2.fill_parameters(request, scalars(asked.parameters))
    v2.fill_outputs(request, signature, [one.name for one in asked.outputs])


def timeout_of(asked: ModelInferRequest) -> float:
    """The seconds of the parameter `timeout`, which is in microseconds; 0 where it is absent or 0."""
    name = "timeout"
    return v2.timeout_of({name: _scalar(asked.parameters[name])} if name in asked.parameters else None)


def scalars(parameters: Mapping[str, InferParameter]) -> dict[str, Scalar]:
    """Parameters as their values."""
    return {name: _scalar(value) for name, value in parameters.items()}


def to_response(
    model: str, request_id: str, reply: PredictReply, places: OutputPlaces | None = None
) -> ModelInferResponse:
    """The answer, tensors always raw. What belongs into `places` is put there, and its raw contents are
    empty. Raises InvalidArgument where that cannot be."""
    elsewhere = places.put(reply.outputs) if places is not None else {}
    answer = ModelInferResponse(model_name=model, model_version=reply.version, id=request_id)
    for tensor in reply.outputs:
        said = answer.outputs.add(
            name=tensor.name, datatype=BY_NUMBER[tensor.datatype].name, shape=tensor.shape
        )
        for name, value in elsewhere.get(tensor.name, {}).items():
            said.parameters[name].CopyFrom(_infer_parameter(value))
        answer.raw_output_contents.append(b"" if tensor.name in elsewhere else tensor.data)
    for name, value in v2.answer_parameters(reply).items():
        answer.parameters[name].CopyFrom(_infer_parameter(value))
    return answer


def _typed(spec: InputSpec, shape: list[int], contents: InferTensorContents, where: str) -> Tensor:
    field = _CONTENTS.get(spec.datatype.name)
    if field is None:
        raise InvalidArgument(
            f"{where}: {spec.datatype.name} is taken in raw_input_contents only.", field=where
        )
    values: list[Any] = list(getattr(contents, field))
    count = 1
    for size in shape:
        count *= size
    if len(values) != count:
        raise InvalidArgument(
            f"{where} has {len(values)} {field} where shape {shape} asks for {count}.", field=where
        )
    try:
        data = pack_flat(spec.datatype, values)
    except (struct.error, OverflowError):
        explain(spec, values, (-1,), where)
        raise
    return Tensor(name=spec.name, datatype=spec.datatype.number, shape=shape, data=data)


def _scalar(parameter: InferParameter) -> Scalar:
    kind = parameter.WhichOneof("parameter_choice")
    value: Scalar = getattr(parameter, kind) if kind else None
    return value


def _infer_parameter(value: Scalar) -> InferParameter:
    if isinstance(value, bool):
        return InferParameter(bool_param=value)
    if isinstance(value, int):
        return InferParameter(int64_param=value)
    if isinstance(value, float):
        return InferParameter(double_param=value)
    return InferParameter(string_param=str(value))
