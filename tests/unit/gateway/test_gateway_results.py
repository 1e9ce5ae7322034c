"""Outputs as JSON: predictions, class names, confidences, and what JSON does not have."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from headrace.v1.dataplane_pb2 import PredictReply
from headrace.v1.tensor_pb2 import Signature, Task, Tensor, TensorSpec

from services.common.errors import Internal
from services.gateway.codecs.native import encode_answer
from services.gateway.codecs.results import array_of, bytes_elements, native_result, widened
from services.gateway.codecs.tensors import pack_bytes
from services.gateway.signature import ModelSignature, compile_signature


def tensor(name: str, kind: str, values: Any, dtype: str) -> Tensor:
    array = np.array(values, dtype=dtype)
    return Tensor(name=name, datatype=f"DATA_TYPE_{kind}", shape=array.shape, data=array.tobytes())


def model(
    outputs: dict[str, str], *, task: Task = Task.TASK_CLASSIFICATION, batched: bool = True, **fields: Any
) -> ModelSignature:
    return compile_signature(
        Signature(
            inputs=[TensorSpec(name="x", datatype="DATA_TYPE_FP32", shape=[-1, 1])],
            outputs=[
                TensorSpec(name=name, datatype=f"DATA_TYPE_{kind}", shape=[-1])
                for name, kind in outputs.items()
            ],
            task=task,
            batched=batched,
            **fields,
        )
    )


PROBABILITIES = tensor("p", "FP32", [[0.2, 0.8], [0.6, 0.4]], "<f4")


def result(signature: ModelSignature, *tensors: Tensor, single: bool = False) -> Any:
    prediction, outputs, confidence = native_result(signature, tensors, single=single)
    return json.loads(orjson.dumps([prediction, outputs, confidence], option=orjson.OPT_SERIALIZE_NUMPY))


def test_probabilities_alone_give_the_label() -> None:
    signature = model({"p": "FP32"}, prediction_output="p", probability_output="p", classes=["no", "yes"])
    assert result(signature, PROBABILITIES)[0] == ["yes", "no"]
    bare = model({"p": "FP32"}, prediction_output="p", probability_output="p")
    assert result(bare, PROBABILITIES)[::2] == [[1, 0], [0.8, 0.6]]


def test_one_probability_column_is_the_positive_class() -> None:
    signature = model({"p": "FP32"}, prediction_output="p", probability_output="p", classes=["no", "yes"])
    one = tensor("p", "FP32", [[0.25], [0.75]], "<f4")
    assert result(signature, one)[::2] == [["no", "yes"], [0.75, 0.75]]


def test_labels_beyond_the_classes_stay_numbers() -> None:
    signature = model({"label": "INT64"}, classes=["a"])
    assert result(signature, tensor("label", "INT64", [0, 5, -1], "<i8"))[0] == ["a", 5, -1]


def test_text_labels_and_single() -> None:
    signature = model({"label": "BYTES", "p": "FP32"}, probability_output="p")
    data = pack_bytes([b"ja"])
    label = Tensor(name="label", datatype="DATA_TYPE_BYTES", shape=[1], data=data)
    one = tensor("p", "FP32", [[0.3, 0.7]], "<f4")
    assert result(signature, label, one, single=True) == ["ja", {"label": ["ja"], "p": [[0.3, 0.7]]}, 0.7]


def test_regression_has_no_confidence_and_loses_the_column() -> None:
    signature = model({"y": "FP64"}, task=Task.TASK_REGRESSION)
    assert result(signature, tensor("y", "FP64", [[1.5], [2.5]], "<f8")) == [
        [1.5, 2.5],
        {"y": [[1.5], [2.5]]},
        None,
    ]


def test_what_json_lacks_becomes_null() -> None:
    signature = model({"y": "FP32"}, task=Task.TASK_REGRESSION)
    values = [float("nan"), float("inf"), float("-inf"), 0.1]
    assert result(signature, tensor("y", "FP32", values, "<f4"))[0] == [None, None, None, 0.1]
    assert result(signature, tensor("y", "FP16", [float("nan"), 0.5], "<f2"))[0] == [None, 0.5]


def test_bf16_is_widened_exactly() -> None:
    exact = np.array([1.0, -2.5, 3.140625], dtype="<f4")
    halves = (exact.view("<u4") >> 16).astype("<u2")
    assert widened(halves).tolist() == exact.tolist()
    found = array_of(Tensor(name="y", datatype="DATA_TYPE_BF16", shape=[3], data=halves.tobytes()))
    assert found.tolist() == exact.tolist()


@pytest.mark.parametrize(
    "broken",
    [
        Tensor(name="y", datatype="DATA_TYPE_FP32", shape=[2], data=b"1234"),
        Tensor(name="y", datatype="DATA_TYPE_BYTES", shape=[1], data=b"\xff\0\0\0a"),
        Tensor(name="y", datatype="DATA_TYPE_BYTES", shape=[2], data=pack_bytes([b"a"])),
        Tensor(name="y", shape=[1], data=b"1234"),
    ],
)
def test_outputs_that_contradict_themselves_are_our_fault(broken: Tensor) -> None:
    with pytest.raises(Internal):
        array_of(broken)


def test_bytes_elements_stop_at_a_length_beyond_the_end() -> None:
    assert list(bytes_elements(pack_bytes([b"", b"abc"]))) == [b"", b"abc"]
    with pytest.raises(ValueError, match="short"):
        list(bytes_elements(b"\x02\0\0\0a"))


def test_the_answer_says_how_it_came_about() -> None:
    signature = model({"y": "FP32"}, task=Task.TASK_REGRESSION)
    reply = PredictReply(
        version="2", variant="b", cached=True, fallback=True, outputs=[tensor("y", "FP32", [1], "<f4")]
    )
    answer = json.loads(encode_answer("id", "m", signature, reply, single=False, latency_ms=1.23456))
    assert answer == {
        "request_id": "id",
        "model": "m",
        "version": "2",
        "variant": "b",
        "prediction": [1.0],
        "outputs": {"y": [1.0]},
        "cached": True,
        "fallback": True,
        "latency_ms": 1.235,
    }


def test_rows_of_numbers_stand_in_the_answer_as_prediction_and_as_output() -> None:
    signature = model({"y": "FP32", "z": "FP32"}, task=Task.TASK_REGRESSION, prediction_output="z")
    rows = [[0.1, float("nan")], [-2.5, 1e-7], [3.0, float("inf")]]
    reply = PredictReply(
        version="1", outputs=[tensor("y", "FP32", [1, 2, 3], "<f4"), tensor("z", "FP32", rows, "<f4")]
    )
    said = json.loads(encode_answer("i", "m", signature, reply, single=False, latency_ms=1.0))
    printed = [[0.1, None], [-2.5, 1e-7], [3.0, None]]
    assert said["prediction"] == printed
    assert said["outputs"] == {"y": [1, 2, 3], "z": printed}
    assert list(said["outputs"]) == ["y", "z"]
