"""Requests held against a signature."""

from __future__ import annotations

import numpy as np
import pytest
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import DataType, Signature, Tensor, TensorSpec

from services.common.errors import InvalidArgument
from services.worker.input_layout import InputLayout

FP32 = DataType.DATA_TYPE_FP32
BOOL = DataType.DATA_TYPE_BOOL
BYTES = DataType.DATA_TYPE_BYTES


def layout(*specs: tuple[str, DataType, list[int]], batched: bool = True) -> InputLayout:
    inputs = [TensorSpec(name=name, datatype=datatype, shape=shape) for name, datatype, shape in specs]
    return InputLayout(Signature(inputs=inputs, outputs=[TensorSpec(name="y")], batched=batched))


def tensor(name: str, datatype: DataType, shape: list[int], data: bytes) -> Tensor:
    return Tensor(name=name, datatype=datatype, shape=shape, data=data)


def test_rows_key_and_bytes_of_a_fixed_shape() -> None:
    one = layout(("x", FP32, [-1, 2, 3]))
    rows, key, data = one.take(PredictRequest(inputs=[tensor("x", FP32, [4, 2, 3], bytes(96))]))
    assert (rows, key, data) == (4, ((), ((2, 3),)), (bytes(96),))
    assert one.fixed
    assert not one.variable


def test_shapes_that_may_not_be_merged_have_different_keys() -> None:
    one = layout(("x", FP32, [-1, -1]))
    keys = {
        one.take(PredictRequest(inputs=[tensor("x", FP32, [1, width], bytes(4 * width))]))[1]
        for width in (1, 2, 2, 3)
    }
    assert len(keys) == 3
    with_outputs = PredictRequest(inputs=[tensor("x", FP32, [1, 1], bytes(4))], outputs=["y"])
    assert one.take(with_outputs)[1] not in keys


def test_inputs_come_back_in_the_order_of_the_signature() -> None:
    one = layout(("a", FP32, [-1]), ("b", FP32, [-1]))
    swapped = [tensor("b", FP32, [1], b"bbbb"), tensor("a", FP32, [1], b"aaaa")]
    rows, key, data = one.take(PredictRequest(inputs=swapped))
    assert data == (b"aaaa", b"bbbb")
    arrays = one.arrays(key, list(data), rows)
    assert list(arrays) == ["a", "b"]
    assert one.named_shapes(key, rows) == [(b"a", FP32, (1,)), (b"b", FP32, (1,))]


@pytest.mark.parametrize("data", [b"", bytes(4)])
def test_a_tensor_without_dimensions_has_no_rows(data: bytes) -> None:
    """Also where a row has no dimension of its own."""
    with pytest.raises(InvalidArgument) as refused:
        layout(("x", FP32, [-1])).take(PredictRequest(inputs=[tensor("x", FP32, [], data)]))
    assert refused.value.field == "inputs.x"


def test_a_model_without_rows_takes_whole_tensors() -> None:
    one = layout(("x", FP32, [2, -1]), batched=False)
    rows, key, data = one.take(PredictRequest(inputs=[tensor("x", FP32, [2, 3], bytes(24))]))
    assert rows == 1
    assert one.arrays(key, list(data), rows)["x"].shape == (2, 3)


def test_text_is_cut_into_elements() -> None:
    one = layout(("text", BYTES, [-1]))
    data = b"\x02\0\0\0hi\0\0\0\0"
    rows, key, taken = one.take(PredictRequest(inputs=[tensor("text", BYTES, [2], data)]))
    assert one.arrays(key, list(taken), rows)["text"].tolist() == [b"hi", b""]


@pytest.mark.parametrize(
    ("inputs", "field", "words"),
    [
        ([], "inputs.x", "missing"),
        ([tensor("z", FP32, [1], b"")], "inputs.z", "no input z"),
        ([tensor("x", FP32, [1], bytes(4))] * 2, "inputs.x", "twice"),
        ([tensor("x", BOOL, [1, 2], bytes(2))], "inputs.x", "x is BOOL, the model takes FP32"),
        ([tensor("x", FP32, [1, 3], bytes(12))], "inputs.x", "shape [1, 3], the model takes [-1, 2]"),
        ([tensor("x", FP32, [2], bytes(8))], "inputs.x", "shape [2]"),
        ([tensor("x", FP32, [], b"")], "inputs.x", "no rows"),
        ([tensor("x", FP32, [-1, 2], b"")], "inputs.x", "no rows"),
        ([tensor("x", FP32, [2, 2], bytes(15))], "inputs.x", "15 bytes, its shape asks for 16"),
        ([tensor("x", FP32, [1 << 62, 2], bytes(16))], "inputs.x", "its shape asks for"),
    ],
)
def test_what_does_not_fit_is_named(inputs: list[Tensor], field: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        layout(("x", FP32, [-1, 2])).take(PredictRequest(inputs=inputs))
    assert refused.value.field == field
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x02\0\0\0h", "past its end"),
        (b"\x02\0", "inside of a length"),
        (b"\0\0\0\0\0\0\0\0", "2 elements, its shape asks for 1"),
        (b"\xff\xff\xff\xffaaaa", "past its end"),
    ],
)
def test_malformed_text_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as refused:
        layout(("text", BYTES, [-1])).take(PredictRequest(inputs=[tensor("text", BYTES, [1], data)]))
    assert refused.value.field == "inputs.text"


@pytest.mark.parametrize("shape", [[-1, 2], [-1, -1]])
def test_bytes_that_are_no_bools_are_refused(shape: list[int]) -> None:
    with pytest.raises(InvalidArgument, match="other than 0 and 1"):
        layout(("x", BOOL, shape)).take(PredictRequest(inputs=[tensor("x", BOOL, [1, 2], b"\1\2")]))


def test_signatures_that_cannot_be_served() -> None:
    with pytest.raises(ValueError, match="no inputs"):
        layout()
    with pytest.raises(ValueError, match="no dimension for rows"):
        layout(("x", FP32, []))
    with pytest.raises(ValueError, match="unknown datatype"):
        layout(("x", DataType.DATA_TYPE_UNSPECIFIED, [-1]))


def test_synthetic_inputs_fit_their_own_signature() -> None:
    one = layout(("x", FP32, [-1, -1, 3]), ("text", BYTES, [-1]), ("on", BOOL, [-1, 1]))
    key, data = one.synthetic(4, 7)
    shapes = [(4, *shape) for shape in key[1]]
    assert shapes == [(4, 7, 3), (4,), (4, 1)]
    arrays = one.arrays(key, data, 4)
    assert arrays["x"].shape == (4, 7, 3)
    assert arrays["text"].tolist() == [b"warm up"] * 4
    assert arrays["on"].dtype == np.bool_


def test_data_that_came_apart_is_checked_and_taken_like_any_other() -> None:
    one = layout(("x", FP32, [-1, 2, 3]))
    bare, content = tensor("x", FP32, [4, 2, 3], b""), memoryview(bytes(range(96)))
    rows, key, data = one.take(PredictRequest(inputs=[bare]), [content])
    assert (rows, key) == (4, ((), ((2, 3),)))
    assert data[0] is content
    with pytest.raises(InvalidArgument, match="92 bytes") as refused:
        one.take(PredictRequest(inputs=[bare]), [content[:92]])
    assert refused.value.field == "inputs.x"


def test_data_apart_belongs_to_the_input_at_its_place_in_the_request() -> None:
    one = layout(("a", FP32, [-1, 2]), ("b", FP32, [-1]))
    given = [tensor("b", FP32, [3], bytes(12)), tensor("a", FP32, [3, 2], b"")]
    content = memoryview(b"\1" * 24)
    rows, _key, data = one.take(PredictRequest(inputs=given), [None, content])
    assert rows == 3
    assert data == (content, bytes(12))
    arrays = one.arrays(((), ((2,), ())), data, rows)
    assert arrays["a"].shape == (3, 2)
    assert arrays["a"].tobytes() == bytes(content)
