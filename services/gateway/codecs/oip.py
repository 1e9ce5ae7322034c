"""ModelInfer messages of the Open Inference Protocol over gRPC to requests and back."""

from __future__ import annotations

import struct
from typing import Any

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Tensor
from open_inference.open_inference_pb2 import (
    InferParameter,
    InferTensorContents,
    ModelInferRequest,
    ModelInferResponse,
)

from services.common.errors import InvalidArgument, Unimplemented
from services.gateway.codecs import v2
from services.gateway.codecs.explain import explain
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


def fill_request(request: PredictRequest, signature: ModelSignature, asked: ModelInferRequest) -> None:
    """Put inputs, outputs and parameters of `asked` into `request`. Raises InvalidArgument naming
    `inputs.<name>`."""
    raw = list(asked.raw_input_contents)
    if raw and len(raw) != len(asked.inputs):
        raise InvalidArgument(
            f"raw_input_contents has {len(raw)} entries for {len(asked.inputs)} inputs.",
            field="raw_input_contents",
        )
    given: dict[str, Tensor] = {}
    for index, one in enumerate(asked.inputs):
        where = f"inputs.{one.name}"
        spec = signature.by_name.get(one.name)
        if spec is None:
            raise InvalidArgument(f"{where} is no input of this model.", field=where)
        if one.name in given:
            raise InvalidArgument(f"{where} is given twice.", field=where)
        if "shared_memory_region" in one.parameters:
            raise Unimplemented(f"{where}: shared memory is not served.", field=where)
        shape = list(one.shape)
        v2.check_declared(spec, one.datatype, shape, where)
        if raw:
            if one.HasField("contents"):
                raise InvalidArgument(f"{where} has contents beside raw_input_contents.", field=where)
            given[one.name] = v2.raw_tensor(spec, shape, raw[index], where)
        else:
            given[one.name] = _typed(spec, shape, one.contents, where)
    for spec in signature.inputs:
        if spec.name not in given:
            raise InvalidArgument(f"inputs.{spec.name} is missing.", field=f"inputs.{spec.name}")
    tensors = [given[spec.name] for spec in signature.inputs]
    v2.check_rows(signature, tensors)
    request.inputs.extend(tensors)
    v2.fill_parameters(request, {name: _scalar(value) for name, value in asked.parameters.items()})
    v2.fill_outputs(request, signature, [one.name for one in asked.outputs])


def timeout_of(asked: ModelInferRequest) -> float:
    """The seconds of the parameter `timeout`, which is in microseconds; 0 where it is absent or 0."""
    name = "timeout"
    return v2.timeout_of({name: _scalar(asked.parameters[name])} if name in asked.parameters else None)


def to_response(model: str, request_id: str, reply: PredictReply) -> ModelInferResponse:
    """The answer, tensors always raw."""
    answer = ModelInferResponse(model_name=model, model_version=reply.version, id=request_id)
    for tensor in reply.outputs:
        answer.outputs.add(name=tensor.name, datatype=BY_NUMBER[tensor.datatype].name, shape=tensor.shape)
        answer.raw_output_contents.append(tensor.data)
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


def _scalar(parameter: InferParameter) -> v2.Scalar:
    kind = parameter.WhichOneof("parameter_choice")
    value: v2.Scalar = getattr(parameter, kind) if kind else None
    return value


def _infer_parameter(value: v2.Scalar) -> InferParameter:
    if isinstance(value, bool):
        return InferParameter(bool_param=value)
    if isinstance(value, int):
        return InferParameter(int64_param=value)
    if isinstance(value, float):
        return InferParameter(double_param=value)
    return InferParameter(string_param=str(value))
