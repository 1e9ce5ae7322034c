"""Columns of tables that pyarrow itself stumbles over: what is wrong is named all the same."""

from __future__ import annotations

import pyarrow as pa
import pytest
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec

from services.common.errors import InvalidArgument
from services.worker.batch.columns import rows_of_table
from services.worker.batch.rows import Inputs

FP32, INT8, BYTES = DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_INT8, DataType.DATA_TYPE_BYTES


def inputs(*specs: tuple[str, DataType, list[int]], batched: bool = True) -> Inputs:
    tensors = [TensorSpec(name=name, datatype=datatype, shape=shape) for name, datatype, shape in specs]
    return Inputs.of(Signature(inputs=tensors, batched=batched))


@pytest.mark.parametrize(
    ("column", "reason", "failed"),
    [
        (pa.array([b"a", b"\xff", b"c"]).view(pa.string()), "can't decode byte 0xff", {1}),
        (pa.array([1, 1 << 62, 2], pa.timestamp("s")), "cannot be read", {0, 1, 2}),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_a_value_that_python_cannot_hold_fails_its_row_of_an_open_shape(
    column: pa.Array, reason: str, failed: set[int], batched: bool
) -> None:
    model = inputs(("n", INT8, [-1]), ("t", BYTES, [-1, -1] if batched else [-1]), batched=batched)
    lists = pa.ListArray.from_arrays([0, 1, 2, 3], column)
    rows = rows_of_table(pa.table({"n": [1, 2, 3], "t": lists}), model, 4)

    assert set(rows.failures) == failed
    assert rows.failures[1].field == "inputs[5].t"
    assert reason in rows.failures[1].message


@pytest.mark.parametrize("size", [1, 2])
def test_lists_of_nulls_fail_their_rows(size: int) -> None:
    column = pa.array([[None] * size, [None] * 3, None], pa.list_(pa.null()))
    rows = rows_of_table(pa.table({"x": column}), inputs(("x", FP32, [-1, 2])), 0)

    assert rows.groups == []
    assert {place: error.field for place, error in rows.failures.items()} == {
        place: f"inputs[{place}].x" for place in range(3)
    }


@pytest.mark.parametrize(
    ("element", "named"),
    [
        (pa.array(["a", "b", "c"], pa.string_view()), "string_view"),
        (pa.array([[None], [None], [None]]), "list<item: null>"),
        (
            pa.RunEndEncodedArray.from_arrays(pa.array([3], pa.int32()), pa.array([1.0])),
            "run_end_encoded",
        ),
    ],
    ids=["view", "nulls", "runs"],
)
def test_lists_of_what_the_model_does_not_take_name_their_column(element: pa.Array, named: str) -> None:
    """Some of other lengths: pyarrow cannot pick the rest out of every type."""
    table = pa.table({"x": pa.ListArray.from_arrays([0, 2, 3], element)})
    with pytest.raises(InvalidArgument, match=named) as caught:
        rows_of_table(table, inputs(("x", FP32, [-1, 2])), 0)
    assert caught.value.field == "inputs.x"


def test_references_into_a_dictionary_with_a_null_are_read() -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 0], pa.int32()), pa.array(["a", None]))
    table = pa.table({"t": pa.ListArray.from_arrays([0, 1, 2, 4], texts)})
    rows = rows_of_table(table, inputs(("t", BYTES, [-1, 1])), 0)

    (group,) = rows.groups
    assert group.arrays["t"].tolist() == [[b"a"]]
    assert list(rows.failures) == [2, 1]


def test_two_columns_of_ids_are_named() -> None:
    column = pa.array([1.0])
    table = pa.Table.from_arrays([column] * 3, ["x", "custom_id", "custom_id"])
    with pytest.raises(InvalidArgument, match="two columns custom_id"):
        rows_of_table(table, inputs(("x", FP32, [-1])), 0)
