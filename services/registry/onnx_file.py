"""What an ONNX file says of itself: inputs, outputs, task, classes. Weights are stepped over, never loaded.

Keys understood in the file's `metadata_props`:

    headrace.task                 classification | regression | embedding | generation
    headrace.prediction_output    name of the output that holds the answer
    headrace.probability_output   name of the output of class probabilities
    headrace.classes              JSON list of class names, by position
    headrace.columns.<tensor>     JSON list of names along the last dimension of an input or output
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from headrace.v1.tensor_pb2 import DataType, Signature, Task, TensorSpec

from services.common.errors import InvalidArgument
from services.registry.onnx_skeleton import skeleton

#: The one file that every version has.
MODEL_FILE = "model.onnx"

_TYPES: dict[int, DataType] = {
    onnx.TensorProto.BOOL: DataType.DATA_TYPE_BOOL,
    onnx.TensorProto.UINT8: DataType.DATA_TYPE_UINT8,
    onnx.TensorProto.UINT16: DataType.DATA_TYPE_UINT16,
    onnx.TensorProto.UINT32: DataType.DATA_TYPE_UINT32,
    onnx.TensorProto.UINT64: DataType.DATA_TYPE_UINT64,
    onnx.TensorProto.INT8: DataType.DATA_TYPE_INT8,
    onnx.TensorProto.INT16: DataType.DATA_TYPE_INT16,
    onnx.TensorProto.INT32: DataType.DATA_TYPE_INT32,
    onnx.TensorProto.INT64: DataType.DATA_TYPE_INT64,
    onnx.TensorProto.FLOAT16: DataType.DATA_TYPE_FP16,
    onnx.TensorProto.FLOAT: DataType.DATA_TYPE_FP32,
    onnx.TensorProto.DOUBLE: DataType.DATA_TYPE_FP64,
    onnx.TensorProto.STRING: DataType.DATA_TYPE_BYTES,
    onnx.TensorProto.BFLOAT16: DataType.DATA_TYPE_BF16,
}
TASKS = {
    "classification": Task.TASK_CLASSIFICATION,
    "regression": Task.TASK_REGRESSION,
    "embedding": Task.TASK_EMBEDDING,
    "generation": Task.TASK_GENERATION,
}
_ELEMENTS = {number: name for name, number in onnx.TensorProto.DataType.items()}
_CLASSIFIERS = {"LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"}
_REGRESSORS = {"LinearRegressor", "SVMRegressor", "TreeEnsembleRegressor"}
_RANDOM = {
    *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    "Sampling",
}
_FLOATS = {DataType.DATA_TYPE_FP16, DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_FP64}


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What was read: the signature, the files beside it that hold weights (paths relative to it), and whether
    the graph draws random numbers, so that equal inputs have unequal answers."""

    signature: Signature
    external_data: frozenset[str]
    random: bool


def read_onnx(path: Path) -> OnnxFile:
    """Parse the ONNX file at `path`. Blocking.

    Raises InvalidArgument, field `files`, where it is no usable ONNX model: not protobuf, cut short, without
    a graph or outputs, with a tensor that cannot be served.
    """
    try:
        return _read(onnx.load_model_from_string(skeleton(path)))
    except (DecodeError, ValueError) as error:  # ValueError also for a name that is not UTF-8
        raise _unusable(f"{MODEL_FILE} is not an ONNX model, or it is cut short or corrupt") from error


def _read(model: onnx.ModelProto) -> OnnxFile:
    _check_structure(model)
    initializers = {item.name for item in model.graph.initializer}
    inputs = [info for info in model.graph.input if info.name not in initializers]
    signature = Signature(
        inputs=[_tensor(info, "input") for info in inputs],
        outputs=[_tensor(info, "output") for info in model.graph.output],
    )
    signature.batched = _batched(signature, inputs)
    _infer_task(signature, model)
    _apply_metadata(signature, {_text(prop.key): _text(prop.value) for prop in model.metadata_props})
    return OnnxFile(signature, frozenset(_external_data(model)), _random(model))


def _unusable(message: str) -> InvalidArgument:
    return InvalidArgument(message, field="files")


def _check_structure(model: onnx.ModelProto) -> None:
    """Refuse what parses as protobuf but cannot be a whole model, such as a file cut at a field's end."""
    if not model.ir_version or not model.opset_import or not model.graph.output:
        raise _unusable(f"{MODEL_FILE} is not a whole ONNX model: it lacks a graph, outputs or operator sets")
    produced = {name for node in model.graph.node for name in node.output}
    produced.update(info.name for info in model.graph.input)
    produced.update(item.name for item in model.graph.initializer)
    produced.update(item.values.name for item in model.graph.sparse_initializer)
    for info in model.graph.output:
        if info.name not in produced:
            raise _unusable(f"{MODEL_FILE} is corrupt: nothing computes its output {info.name!r}")


def _tensor(info: onnx.ValueInfoProto, kind: str) -> TensorSpec:
    if info.type.WhichOneof("value") != "tensor_type":
        hint = ""
        if info.type.HasField("sequence_type"):
            hint = "; from scikit-learn, export with options={'zipmap': False}"
        raise _unusable(f"{kind} {info.name!r} is not a tensor{hint}")
    tensor = info.type.tensor_type
    datatype = _TYPES.get(tensor.elem_type)
    if datatype is None:
        element = _ELEMENTS.get(tensor.elem_type, tensor.elem_type)
        raise _unusable(f"{kind} {info.name!r} has element type {element}, which cannot be served")
    if not tensor.HasField("shape"):
        raise _unusable(f"{kind} {info.name!r} has no shape; write its rank into the file")
    shape = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else -1 for d in tensor.shape.dim]
    return TensorSpec(name=info.name, datatype=datatype, shape=shape)


def _batched(signature: Signature, inputs: Iterable[onnx.ValueInfoProto]) -> bool:
    """Whether the first dimension of every tensor counts rows: all are variable, and the inputs, where they
    name theirs, give it one name (two names are two lengths, not one batch)."""
    tensors = [*signature.inputs, *signature.outputs]
    if not signature.inputs or any(not spec.shape or spec.shape[0] != -1 for spec in tensors):
        return False
    return len({info.type.tensor_type.shape.dim[0].dim_param for info in inputs} - {""}) <= 1


def _infer_task(signature: Signature, model: onnx.ModelProto) -> None:
    """Recognize classifiers and regressors as skl2onnx and onnxmltools write them."""
    nodes = [node for node in model.graph.node if node.domain == "ai.onnx.ml"]
    operators = {node.op_type for node in nodes}
    labels = [spec for spec in signature.outputs if spec.datatype not in _FLOATS and "label" in spec.name]
    probabilities = [
        spec
        for spec in signature.outputs
        if spec.datatype in _FLOATS and len(spec.shape) == 2 and "prob" in spec.name
    ]
    if len(labels) == 1 and (probabilities or operators & _CLASSIFIERS):
        signature.task = Task.TASK_CLASSIFICATION
        signature.prediction_output = labels[0].name
        if len(probabilities) == 1:
            signature.probability_output = probabilities[0].name
            signature.classes.extend(_class_names(nodes, probabilities[0].shape[1]))
    elif operators & _REGRESSORS and len(signature.outputs) == 1:
        signature.task = Task.TASK_REGRESSION
        signature.prediction_output = signature.outputs[0].name


def _class_names(nodes: Iterable[onnx.NodeProto], width: int) -> list[str]:
    """Text labels that the graph's classifier carries; empty where they are numbers or do not fit `width`."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in {"classlabels_strings", "cats_strings"} and attribute.strings:
                names = [text.decode("utf-8", "replace") for text in attribute.strings]
                if width in (-1, len(names)):
                    return names
    return []


def _apply_metadata(signature: Signature, properties: dict[str, str]) -> None:
    """Let the file's own `headrace.*` properties complete what was inferred. Raises where they do not fit."""
    outputs = {spec.name: spec for spec in signature.outputs}
    tensors = {spec.name: spec for spec in signature.inputs} | outputs
    if "headrace.task" in properties:
        task = TASKS.get(properties["headrace.task"])
        if task is None:
            raise _unusable(f"headrace.task names no task: {properties['headrace.task']!r}")
        signature.task = task
    for role in ("prediction_output", "probability_output"):
        name = properties.get(f"headrace.{role}")
        if name is None:
            continue
        if name and name not in outputs:
            raise _unusable(f"headrace.{role} names no output: {name!r}")
        setattr(signature, role, name)
    if "headrace.classes" in properties:
        signature.classes[:] = _names(properties, "headrace.classes")
    for key in properties:
        name = key.removeprefix("headrace.columns.")
        if name == key:
            continue
        if name not in tensors:
            raise _unusable(f"{key} names no input or output")
        tensors[name].columns[:] = _names(properties, key)
    check_names(signature)


def check_names(signature: Signature, prefix: str = "files", *, fields: bool = False) -> None:
    """Raise InvalidArgument unless column and class names match the dimensions that they name.

    The error's field is `prefix`, followed by the place inside the signature where `fields` is set.
    """
    for kind, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        for index, spec in enumerate(specs):
            if spec.columns and not _fits(len(spec.columns), spec):
                field = f"{prefix}.{kind}[{index}].columns" if fields else prefix
                size = spec.shape[-1] if spec.shape else 0
                raise InvalidArgument(
                    f"{len(spec.columns)} columns do not match the last dimension of {spec.name!r}, {size}",
                    field=field,
                )
    for spec in signature.outputs:
        named = signature.classes and spec.name == signature.probability_output
        if named and not _fits(len(signature.classes), spec):
            raise InvalidArgument(
                f"{len(signature.classes)} classes do not match the {spec.shape[-1]} probabilities",
                field=f"{prefix}.classes" if fields else prefix,
            )


def _fits(count: int, spec: TensorSpec) -> bool:
    return bool(spec.shape) and spec.shape[-1] in (-1, count)


def _names(properties: dict[str, str], key: str) -> list[str]:
    try:
        names = json.loads(properties[key])
    except (json.JSONDecodeError, RecursionError) as error:  # RecursionError: nested too deep
        raise _unusable(f"{key} is not JSON") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _unusable(f"{key} is not a JSON list of texts")
    return names


def _text(value: object) -> str:
    """`value` as text: protobuf hands out bytes where a text is not UTF-8. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("a text is not UTF-8")  # noqa: TRY004 - wrong in the file, not in the code
    return value


def _random(model: onnx.ModelProto) -> bool:
    """Whether there is a random operator anywhere. A seed makes the runs of a session repeatable from its
    start on, not one run like the next."""
    return _draws(model.graph.node) or any(_draws(function.node) for function in model.functions)


def _draws(nodes: Iterable[onnx.NodeProto]) -> bool:
    return any(
        node.op_type in _RANDOM
        or any(_draws(inner.node) for item in node.attribute for inner in (item.g, *item.graphs))
        for node in nodes
    )


def _external_data(model: onnx.ModelProto) -> Iterator[str]:
    functions = (_tensors_of(function.node) for function in model.functions)
    for tensor in chain(_tensors(model.graph), *functions):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            for entry in tensor.external_data:
                if entry.key == "location":
                    yield _text(entry.value)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of `graph`, those of the graphs inside it too."""
    yield from graph.initializer
    yield from _dense(graph.sparse_initializer)
    yield from _tensors_of(graph.node)


def _tensors_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for item in node.attribute:
            yield from (item.t, *item.tensors)
            yield from _dense((item.sparse_tensor, *item.sparse_tensors))
            for inner in (item.g, *item.graphs):
                yield from _tensors(inner)


def _dense(tensors: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for tensor in tensors:
        yield from (tensor.values, tensor.indices)
