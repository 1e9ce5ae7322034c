"""The classification extension: an output as its best classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from headrace.v1.dataplane_pb2 import PredictReply
from headrace.v1.tensor_pb2 import DataType, Signature, Task, Tensor, TensorSpec

from services.common.errors import InvalidArgument
from services.gateway.codecs.classes import put_classes, wanted_classes
from services.gateway.codecs.results import array_of
from services.gateway.signature import ModelSignature, compile_signature


def signature_of(
    kind: str = "FP32", *, batched: bool = True, task: Task = Task.TASK_CLASSIFICATION
) -> ModelSignature:
    x = TensorSpec(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 3])
    scores = TensorSpec(name="scores", datatype=f"DATA_TYPE_{kind}", shape=[-1, 3])
    return compile_signature(
        Signature(batched=batched, inputs=[x], outputs=[scores], task=task, classes=["a", "b", "c"])
    )


def best(scores: np.ndarray, kind: str, count: int, signature: ModelSignature) -> list[object]:
    tensor = Tensor(name="scores", datatype=f"DATA_TYPE_{kind}", shape=scores.shape, data=scores.tobytes())
    reply = PredictReply(outputs=[tensor, Tensor(name="other", data=b"1")])
    put_classes(reply, {"scores": count}, signature)
    assert reply.outputs[0].datatype == DataType.DATA_TYPE_BYTES
    assert reply.outputs[1].data == b"1"
    found: list[object] = array_of(reply.outputs[0]).tolist()
    return found


def test_the_best_come_first_and_equal_ones_as_they_stand() -> None:
    rows = np.array([[0.1, 0.7, 0.2], [0.4, 0.2, 0.4]], np.float32)
    assert best(rows, "FP32", 2, signature_of()) == [["0.7:1:b", "0.2:2:c"], ["0.4:0:a", "0.4:2:c"]]
    assert best(rows, "FP32", 9, signature_of())[0] == ["0.7:1:b", "0.2:2:c", "0.1:0:a"]
    unsure = np.array([[np.nan, -1.5, np.inf]], np.float32)
    assert best(unsure, "FP32", 3, signature_of()) == [["inf:2:c", "-1.5:1:b", "nan:0:a"]]
    counts = np.array([[3, 2**64 - 1, 0]], np.uint64)
    assert best(counts, "UINT64", 2, signature_of("UINT64")) == [["18446744073709551615:1:b", "3:0:a"]]
    assert best(rows[:1].view("<u2")[:, 1::2], "BF16", 1, signature_of("BF16")) == [["0.69921875:1:b"]]


def test_names_are_those_of_a_classifiers_classes() -> None:
    rows = np.array([[0.1, 0.7, 0.2]], np.float32)
    assert best(rows, "FP32", 1, signature_of(task=Task.TASK_REGRESSION)) == [["0.7:1"]]
    assert best(rows[:, :1], "FP32", 3, signature_of()) == [["0.1:0"]]


def test_without_rows_there_is_one_list() -> None:
    scores = np.array([0.1, 0.7, 0.2], np.float32)
    assert best(scores, "FP32", 2, signature_of(batched=False)) == ["0.7:1:b", "0.2:2:c"]
    assert best(np.zeros((0, 3), np.float32), "FP32", 2, signature_of()) == []


def test_texts_have_a_bound() -> None:
    rows = np.zeros((16_385, 3), np.float32)
    with pytest.raises(InvalidArgument, match="fewer classes") as refused:
        best(rows, "FP32", 1, signature_of())
    assert refused.value.field == "outputs.scores"
    assert len(best(rows[:-1], "FP32", 1, signature_of())) == 16_384


@pytest.mark.parametrize("said", [True, -1, "2", 1.5])
def test_counts_are_whole_numbers(said: object) -> None:
    with pytest.raises(InvalidArgument, match="number of classes"):
        wanted_classes(signature_of(), [("scores", {"classification": said})])  # type: ignore[dict-item]


@pytest.mark.parametrize(("kind", "fits"), [("BYTES", False), ("BOOL", False), ("INT8", True)])
def test_only_numbers_have_best_classes(kind: str, fits: bool) -> None:
    wanted: list[tuple[str, Mapping[str, int] | None]] = [("scores", {"classification": 2})]
    if fits:
        assert wanted_classes(signature_of(kind), wanted) == {"scores": 2}
        return
    with pytest.raises(InvalidArgument, match=r"outputs\.scores has no numbers"):
        wanted_classes(signature_of(kind), wanted)


def test_none_is_said_for_outputs_as_they_are() -> None:
    assert wanted_classes(signature_of(), [("scores", None), ("scores", {"classification": 0})]) is None
