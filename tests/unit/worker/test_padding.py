"""What an artifact may declare about padding, and what is told to one that declares nonsense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec

from services.worker.backends.onnx import load
from services.worker.backends.port import BackendOptions, LoadFailed, Padding
from services.worker.padding import declared_padding
from tests.fixtures.onnx_models import two_inputs, with_metadata

FP32, INT64, UINT8 = DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_INT64, DataType.DATA_TYPE_UINT8
SIGNATURE = Signature(
    inputs=[
        TensorSpec(name="ids", datatype=INT64, shape=[-1, -1]),
        TensorSpec(name="mask", datatype=UINT8, shape=[-1, -1]),
        TensorSpec(name="age", datatype=FP32, shape=[-1, 1]),
    ],
    outputs=[
        TensorSpec(name="scores", datatype=FP32, shape=[-1, -1, 5]),
        TensorSpec(name="label", datatype=INT64, shape=[-1]),
    ],
    batched=True,
)
INPUTS: dict[str, list[object]] = {"ids": ["n", "seq"], "mask": ["n", "seq"], "age": ["n", 1]}
OUTPUTS: dict[str, list[object]] = {"scores": ["n", "seq", 5], "label": ["n"]}
PADS = {"headrace.pad.ids": "103", "headrace.pad.mask": "0", "author": "x"}


def test_axes_and_values_come_from_graph_and_metadata() -> None:
    assert declared_padding({"author": "x"}, INPUTS, OUTPUTS, SIGNATURE) is None
    assert declared_padding(PADS, INPUTS, OUTPUTS, SIGNATURE) == Padding(
        {"ids": (0, np.int64(103).tobytes()), "mask": (0, b"\0")}, {"scores": (0,), "label": ()}
    )


@pytest.mark.parametrize(
    ("changes", "inputs", "outputs", "reason"),
    [
        ({"headrace.pad.mask": None}, {}, {}, "headrace.pad.mask is missing"),
        ({"headrace.pad.age": "0"}, {}, {}, "headrace.pad.age names no input of open length"),
        ({"headrace.pad.mask": "300"}, {}, {}, "'300' is no UINT8"),
        ({"headrace.pad.ids": "many"}, {}, {}, "'many' is no INT64"),
        ({"headrace.pad.ids": "1.5"}, {}, {}, "'1.5' is no INT64"),
        ({}, {"mask": ["n", "other"]}, {}, "share one named dimension"),
        ({}, {"mask": ["n", None], "ids": ["n", None]}, {}, "share one named dimension"),
        ({}, {}, {"scores": ["n", "unk__1", 5]}, "output scores has the open dimension unk__1"),
    ],
)
def test_what_cannot_hold_is_refused(
    changes: dict[str, str | None],
    inputs: dict[str, list[object]],
    outputs: dict[str, list[object]],
    reason: str,
) -> None:
    pads = {name: text for name, text in {**PADS, **changes}.items() if text is not None}
    with pytest.raises(LoadFailed, match=reason):
        declared_padding(pads, {**INPUTS, **inputs}, {**OUTPUTS, **outputs}, SIGNATURE)


def test_a_model_without_rows_is_not_padded() -> None:
    with pytest.raises(LoadFailed, match="without rows"):
        declared_padding(PADS, INPUTS, OUTPUTS, Signature(inputs=SIGNATURE.inputs, outputs=SIGNATURE.outputs))


def test_the_open_dimension_may_stand_behind_others() -> None:
    signature = Signature(
        inputs=[TensorSpec(name="x", datatype=FP32, shape=[-1, 3, -1])],
        outputs=[TensorSpec(name="y", datatype=FP32, shape=[-1, 2, -1])],
        batched=True,
    )
    padding = declared_padding(
        {"headrace.pad.x": "0"}, {"x": ["n", 3, "seq"]}, {"y": ["n", 2, "seq"]}, signature
    )
    assert padding == Padding({"x": (1, bytes(4))}, {"y": (1,)})


def test_two_open_dimensions_of_one_input_are_refused_even_under_one_name() -> None:
    signature = Signature(
        inputs=[
            TensorSpec(name="x", datatype=FP32, shape=[-1, -1, -1]),
            TensorSpec(name="y", datatype=FP32, shape=[-1, -1]),
        ],
        batched=True,
    )
    inputs = {"x": ["n", "seq", "seq"], "y": ["n", "seq"]}
    with pytest.raises(LoadFailed, match="share one named dimension"):
        declared_padding({"headrace.pad.x": "0", "headrace.pad.y": "0"}, inputs, {}, signature)


@pytest.mark.parametrize("datatype", [DataType.DATA_TYPE_BYTES, DataType.DATA_TYPE_BF16])
def test_what_has_no_value_to_fill_up_with_is_refused(datatype: DataType) -> None:
    signature = Signature(inputs=[TensorSpec(name="x", datatype=datatype, shape=[-1, -1])], batched=True)
    with pytest.raises(LoadFailed, match="cannot be padded"):
        declared_padding({"headrace.pad.x": "0"}, {"x": ["n", "seq"]}, {}, signature)


def test_an_onnx_model_carries_its_padding(tmp_path: Path) -> None:
    data, signature = with_metadata(two_inputs(), **{"headrace.pad.a": "1.5", "headrace.pad.b": "0"})
    (tmp_path / "model.onnx").write_bytes(data)
    backend = load(tmp_path, signature, BackendOptions())
    assert backend.padding == Padding(
        {"a": (0, np.float32(1.5).tobytes()), "b": (0, np.float32(0).tobytes())},
        {"sum": (0,), "doubled": (0,)},
    )
