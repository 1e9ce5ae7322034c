"""What is read from ONNX files, and what may be said on top of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from headrace.v1.tensor_pb2 import DataType, Signature, Task
from onnx import TensorProto, helper

from services.common.errors import InvalidArgument
from services.registry.onnx_file import read_onnx
from services.registry.schemas import SignatureOverrides
from services.registry.signatures import describe
from tests.fixtures.onnx_files import classifier, encoder, linear, model_bytes, noisy, value

NOTHING = SignatureOverrides()


def read(content: bytes, tmp_path: Path) -> Signature:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    return read_onnx(path).signature


def described(
    tmp_path: Path, files: dict[str, bytes], backend: str = "", **overrides: Any
) -> tuple[str, Signature]:
    paths = {}
    for number, (name, content) in enumerate(files.items()):
        paths[name] = tmp_path / str(number)
        paths[name].write_bytes(content)
    made = describe(paths, backend, SignatureOverrides.model_validate(overrides))
    return made.backend, made.signature


def refused_field(tmp_path: Path, files: dict[str, bytes], backend: str = "", **overrides: Any) -> str | None:
    with pytest.raises(InvalidArgument) as caught:
        described(tmp_path, files, backend, **overrides)
    return caught.value.field


def test_names_types_and_variable_dimensions(tmp_path: Path) -> None:
    signature = read(linear(features=5), tmp_path)
    (x,), (y,) = signature.inputs, signature.outputs
    assert (x.name, x.datatype, list(x.shape)) == ("x", DataType.DATA_TYPE_FP32, [-1, 5])
    assert (y.name, y.datatype, list(y.shape)) == ("y", DataType.DATA_TYPE_FP32, [-1, 1])
    assert signature.batched
    assert signature.task == Task.TASK_UNSPECIFIED


def test_random_operators_are_found_wherever_they_are(tmp_path: Path) -> None:
    def draws(content: bytes) -> bool:
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        return read_onnx(path).random

    assert not draws(linear())
    assert draws(noisy())
    condition = value("c", TensorProto.BOOL, 1)
    branch = onnx.load_model_from_string(noisy()).graph
    del branch.input[:]
    choice = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    x = value("x", TensorProto.FLOAT, "batch", 3)
    assert draws(model_bytes([condition, x], [value("y", TensorProto.FLOAT, "batch", 3)], [choice]))


@pytest.mark.parametrize(
    ("element", "datatype"),
    [
        (TensorProto.BOOL, DataType.DATA_TYPE_BOOL),
        (TensorProto.UINT8, DataType.DATA_TYPE_UINT8),
        (TensorProto.INT64, DataType.DATA_TYPE_INT64),
        (TensorProto.FLOAT16, DataType.DATA_TYPE_FP16),
        (TensorProto.DOUBLE, DataType.DATA_TYPE_FP64),
        (TensorProto.STRING, DataType.DATA_TYPE_BYTES),
        (TensorProto.BFLOAT16, DataType.DATA_TYPE_BF16),
    ],
)
def test_element_types(tmp_path: Path, element: int, datatype: DataType) -> None:
    identity = helper.make_node("Identity", ["x"], ["y"])
    content = model_bytes([value("x", element, "n")], [value("y", element, "n")], [identity])
    assert read(content, tmp_path).inputs[0].datatype == datatype


def test_initializers_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(linear())
    model.graph.input.append(value("w", TensorProto.FLOAT, 3, 1))
    assert [spec.name for spec in read(model.SerializeToString(), tmp_path).inputs] == ["x"]


@pytest.mark.parametrize(
    ("first", "second", "batched"),
    [
        (("n", 2), ("n", 3), True),
        (("n", 2), ("m", 3), False),
        (("n", 2), (4, 3), False),
        ((), ("n", 3), False),
    ],
)
def test_batched_means_one_variable_row_count(
    tmp_path: Path, first: tuple[Any, ...], second: tuple[Any, ...], batched: bool
) -> None:
    nodes = [helper.make_node("Identity", ["b"], ["y"])]
    inputs = [value("a", TensorProto.FLOAT, *first), value("b", TensorProto.FLOAT, *second)]
    content = model_bytes(inputs, [value("y", TensorProto.FLOAT, None, 3)], nodes)
    assert read(content, tmp_path).batched is batched


def test_a_classifier_is_recognized(tmp_path: Path) -> None:
    signature = read(classifier(["ham", "spam", "eggs"]), tmp_path)
    assert signature.task == Task.TASK_CLASSIFICATION
    assert (signature.prediction_output, signature.probability_output) == ("label", "probabilities")
    assert list(signature.classes) == ["ham", "spam", "eggs"]


def test_a_regressor_is_recognized(tmp_path: Path) -> None:
    node = helper.make_node(
        "LinearRegressor", ["x"], ["variable"], domain="ai.onnx.ml", coefficients=[1.0, 2.0], intercepts=[0.0]
    )
    content = model_bytes(
        [value("x", TensorProto.FLOAT, None, 2)], [value("variable", TensorProto.FLOAT, None, 1)], [node]
    )
    signature = read(content, tmp_path)
    assert (signature.task, signature.prediction_output) == (Task.TASK_REGRESSION, "variable")


def test_the_files_own_properties_win(tmp_path: Path) -> None:
    properties = {
        "headrace.task": "regression",
        "headrace.prediction_output": "probabilities",
        "headrace.probability_output": "",
        "headrace.classes": "[]",
        "headrace.columns.x": json.dumps(["age", "income"]),
        "somebody.else": "stays out of it",
    }
    signature = read(classifier(metadata=properties), tmp_path)
    assert (signature.task, signature.prediction_output) == (Task.TASK_REGRESSION, "probabilities")
    assert (signature.probability_output, list(signature.classes)) == ("", [])
    assert list(signature.inputs[0].columns) == ["age", "income"]


@pytest.mark.parametrize(
    "properties",
    [
        {"headrace.task": "dance"},
        {"headrace.prediction_output": "nobody"},
        {"headrace.classes": "not json"},
        {"headrace.classes": "[" * 100_000},
        {"headrace.classes": '["only one"]'},
        {"headrace.columns.x": '["one", "two", "three"]'},
        {"headrace.columns.x": '{"a": 1}'},
        {"headrace.columns.nobody": '["a"]'},
    ],
)
def test_properties_that_do_not_fit_are_refused(tmp_path: Path, properties: dict[str, str]) -> None:
    assert refused_field(tmp_path, {"model.onnx": classifier(metadata=properties)}) == "files"


def broken_files() -> dict[str, bytes]:
    whole = linear()
    model = onnx.load_model_from_string(whole)
    no_opset, dangling, sequence, complex_, shapeless = (onnx.ModelProto() for _ in range(5))
    for copy in (no_opset, dangling, sequence, complex_, shapeless):
        copy.CopyFrom(model)
    del no_opset.opset_import[:]
    del dangling.graph.node[:]
    sequence.graph.output[0].type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    complex_.graph.input[0].type.tensor_type.elem_type = TensorProto.COMPLEX64
    shapeless.graph.output[0].type.tensor_type.ClearField("shape")
    files = {
        "empty": b"",
        "text": b"hello world, this is no model",
        "cut in the middle": whole[: len(whole) // 2],
        "cut by one byte": whole[:-1],
        "noise": bytes(range(256)) * 8,
    }
    made = (no_opset, dangling, sequence, complex_, shapeless)
    names = ("no operator set", "nothing computes y", "a sequence", "complex numbers", "unknown rank")
    return files | {name: copy.SerializeToString() for name, copy in zip(names, made, strict=True)}


@pytest.mark.parametrize("content", broken_files().values(), ids=broken_files().keys())
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    assert refused_field(tmp_path, {"model.onnx": content}) == "files"


def test_an_unknown_element_type_is_refused(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(linear())
    model.graph.input[0].type.tensor_type.elem_type = 999
    assert refused_field(tmp_path, {"model.onnx": model.SerializeToString()}) == "files"


def test_weights_kept_outside_must_come_along(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(linear())
    weights = model.graph.initializer[0]
    weights.data_location = TensorProto.EXTERNAL
    weights.ClearField("float_data")
    weights.external_data.add(key="location", value="model.onnx.data")
    content = model.SerializeToString()
    assert refused_field(tmp_path, {"model.onnx": content}) == "files"
    backend, _signature = described(tmp_path, {"model.onnx": content, "model.onnx.data": b"\0" * 12})
    assert backend == "onnx"


def outside() -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../weights.bin")
    return tensor


def _in_a_constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["w"], value=outside()))


def _in_a_branch(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [value("w", TensorProto.FLOAT, 1)], [outside()])
    deep = helper.make_node("If", ["c"], ["w"], then_branch=inner, else_branch=inner)
    branch = helper.make_graph([deep], "branch", [], [value("w", TensorProto.FLOAT, 1)])
    model.graph.node.append(helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))


def _in_a_function(model: onnx.ModelProto) -> None:
    constant = helper.make_node("Constant", [], ["w"], value=outside())
    model.functions.append(
        helper.make_function("own", "f", [], ["w"], [constant], [helper.make_opsetid("", 17)])
    )


def _in_a_list(model: onnx.ModelProto) -> None:
    node = helper.make_node("Own", [], ["w"], domain="own", parts=[outside()])
    model.graph.node.append(node)


def _sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add(values=outside(), dims=[1])


@pytest.mark.parametrize(
    "put", [_in_a_constant, _in_a_branch, _in_a_function, _in_a_list, _sparse], ids=lambda put: put.__name__
)
def test_weights_kept_outside_are_found_wherever_they_are(
    tmp_path: Path, put: Callable[[onnx.ModelProto], None]
) -> None:
    model = onnx.load_model_from_string(linear())
    assert described(tmp_path, {"model.onnx": model.SerializeToString()})[0] == "onnx"
    put(model)
    assert refused_field(tmp_path, {"model.onnx": model.SerializeToString()}) == "files"


def test_overrides_complete_the_file(tmp_path: Path) -> None:
    content = model_bytes(
        [value("x", TensorProto.FLOAT, "n", "features")],
        [value("logits", TensorProto.FLOAT, "n", 2)],
        [helper.make_node("Identity", ["x"], ["logits"])],
    )
    _backend, signature = described(
        tmp_path,
        {"model.onnx": content},
        inputs=[{"name": "x", "datatype": "FP32", "shape": [-1, 2], "columns": ["a", "b"]}],
        task="classification",
        probability_output="logits",
        classes=["no", "yes"],
    )
    assert list(signature.inputs[0].shape) == [-1, 2]
    assert list(signature.inputs[0].columns) == ["a", "b"]
    assert (signature.task, list(signature.classes)) == (Task.TASK_CLASSIFICATION, ["no", "yes"])
    assert signature.batched


def test_rows_may_be_kept_apart(tmp_path: Path) -> None:
    _backend, signature = described(tmp_path, {"model.onnx": linear()}, batched=False)
    assert not signature.batched
    _backend, fixed = described(tmp_path, {"model.onnx": linear()}, inputs=[{"name": "x", "shape": [1, 3]}])
    assert not fixed.batched


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"inputs": [{"name": "z"}]}, "signature.inputs[0].name"),
        ({"inputs": [{"name": "x"}, {"name": "x"}]}, "signature.inputs[1].name"),
        ({"inputs": [{"name": "x", "datatype": "INT64"}]}, "signature.inputs[0].datatype"),
        ({"inputs": [{"name": "x", "shape": [-1, 3]}]}, "signature.inputs[0].shape"),
        ({"inputs": [{"name": "x", "shape": [2]}]}, "signature.inputs[0].shape"),
        ({"inputs": [{"name": "x", "shape": [-1, -1]}]}, "signature.inputs[0].shape"),
        ({"inputs": [{"name": "x", "columns": ["a"]}]}, "signature.inputs[0].columns"),
        ({"outputs": [{"name": "x"}]}, "signature.outputs[0].name"),
        ({"prediction_output": "x"}, "signature.prediction_output"),
        ({"probability_output": "nobody"}, "signature.probability_output"),
        ({"classes": ["a", "b", "c"]}, "signature.classes"),
        ({"inputs": [{"name": "x", "shape": [1, 2]}], "batched": True}, "signature.batched"),
    ],
)
def test_overrides_that_contradict_the_file_are_refused(
    tmp_path: Path, overrides: dict[str, Any], field: str
) -> None:
    assert refused_field(tmp_path, {"model.onnx": classifier()}, **overrides) == field


TOKENIZER = json.dumps({"model": {"type": "WordPiece"}}).encode()


def test_an_encoder_with_its_tokenizer_takes_texts(tmp_path: Path) -> None:
    backend, signature = described(tmp_path, {"model.onnx": encoder(7), "tokenizer.json": TOKENIZER})
    (text,), (vectors,) = signature.inputs, signature.outputs
    assert backend == "embedding"
    assert (text.name, text.datatype, list(text.shape)) == ("text", DataType.DATA_TYPE_BYTES, [-1])
    assert (vectors.name, vectors.datatype) == ("embeddings", DataType.DATA_TYPE_FP32)
    assert list(vectors.shape) == [-1, 7]
    assert (signature.batched, signature.task) == (True, Task.TASK_EMBEDDING)


def test_an_encoder_may_be_served_as_plain_tensors(tmp_path: Path) -> None:
    backend, signature = described(tmp_path, {"model.onnx": encoder(), "tokenizer.json": TOKENIZER}, "onnx")
    assert backend == "onnx"
    assert [spec.name for spec in signature.inputs] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("files", "backend", "field"),
    [
        ({"model.onnx": encoder()}, "embedding", "files"),
        ({"model.onnx": encoder(), "tokenizer.json": b"{"}, "embedding", "files"),
        ({"model.onnx": encoder(), "tokenizer.json": b"[]"}, "embedding", "files"),
        ({"model.onnx": encoder(), "tokenizer.json": b"[" * 100_000}, "embedding", "files"),
        ({"model.onnx": encoder(), "tokenizer.json": b'{"model": 1}'}, "embedding", "files"),
        ({"model.onnx": linear(), "tokenizer.json": TOKENIZER}, "embedding", "files"),
        ({"model.onnx": linear()}, "torch", "backend"),
        ({"weights.bin": b"1"}, "", "files"),
        ({}, "onnx", "files"),
    ],
)
def test_backends_need_their_files(tmp_path: Path, files: dict[str, bytes], backend: str, field: str) -> None:
    assert refused_field(tmp_path, files, backend) == field


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"churn.joblib": b"x"}, "here is churn.joblib: export the model"),
        ({"a.onnx": b"x", "b.onnx": b"y"}, "one is named model.onnx; here are a.onnx, b.onnx"),
    ],
)
def test_files_without_a_model_are_told_what_is_missing(
    tmp_path: Path, files: dict[str, bytes], told: str
) -> None:
    with pytest.raises(InvalidArgument, match=told) as refused:
        described(tmp_path, files)
    assert refused.value.field == "files"
