from __future__ import annotations

import numpy as np
import pytest
from headrace.v1.dataplane_pb2 import Origin
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Signature, Task, Tensor, TensorSpec

from services.common.errors import InvalidArgument
from services.common.tensors import encode_bytes
from services.drift.observations import MAX_COLUMNS, observe
from services.drift.reading import Numbered, observe_all

SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 2], columns=["age", "dose"])],
    outputs=[
        TensorSpec(name="label", datatype=DataType.DATA_TYPE_INT64, shape=[-1]),
        TensorSpec(name="p", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 2]),
    ],
    batched=True,
    task=Task.TASK_CLASSIFICATION,
    prediction_output="label",
    probability_output="p",
    classes=["bad", "good"],
)


def tensor(name: str, array: np.ndarray, datatype: DataType) -> Tensor:
    return Tensor(name=name, datatype=datatype, shape=array.shape, data=array.tobytes())


def batch(codes: list[Code], rows: list[int], origins: list[Origin]) -> PredictionBatch:
    answered = sum(n for n, code in zip(rows, codes, strict=True) if code == Code.CODE_OK)
    x = np.arange(2 * answered, dtype="<f4").reshape(answered, 2)
    label = (np.arange(answered) % 2).astype("<i8")
    p = np.tile(np.array([0.25, 0.75], "<f4"), (answered, 1))
    return PredictionBatch(
        codes=codes,
        rows=rows,
        origins=origins,
        inputs=[tensor("x", x, DataType.DATA_TYPE_FP32)],
        outputs=[tensor("label", label, DataType.DATA_TYPE_INT64), tensor("p", p, DataType.DATA_TYPE_FP32)],
    )


def test_columns_get_the_names_of_the_signature() -> None:
    seen = observe(batch([Code.CODE_OK], [3], [Origin.ORIGIN_ONLINE]), SIGNATURE)
    assert seen.rows == 3
    assert seen.numeric["age"].tolist() == [0, 2, 4]
    assert seen.numeric["dose"].tolist() == [1, 3, 5]
    assert seen.categorical["prediction"] == ["bad", "good", "bad"]
    assert seen.numeric["prediction.confidence"].tolist() == [0.75] * 3


def test_only_online_rows_that_were_answered_count() -> None:
    codes = [Code.CODE_OK, Code.CODE_INTERNAL, Code.CODE_OK, Code.CODE_OK]
    origins = [Origin.ORIGIN_ONLINE, Origin.ORIGIN_ONLINE, Origin.ORIGIN_SHADOW, Origin.ORIGIN_UNSPECIFIED]
    seen = observe(batch(codes, [1, 2, 1, 2], origins), SIGNATURE)
    # The failed request has no rows in the tensors; the shadow's row, the second, is left out.
    assert seen.numeric["age"].tolist() == [0, 4, 6]
    assert seen.rows == 3


def test_a_record_without_payloads_says_nothing() -> None:
    record = PredictionBatch(codes=[Code.CODE_OK], rows=[4])
    assert observe(record, SIGNATURE).rows == 0


def test_answers_count_where_inputs_were_too_large_to_be_logged() -> None:
    record = batch([Code.CODE_OK, Code.CODE_OK], [1, 1], [])
    with_inputs = observe(record, SIGNATURE)
    del record.inputs[:]
    seen = observe(record, SIGNATURE)
    assert seen.rows == 2
    assert "age" not in seen.numeric
    assert seen.categorical == with_inputs.categorical
    assert seen.categorical or "prediction" in seen.numeric


def test_answers_that_are_texts_are_measured() -> None:
    """They are neither numbers nor the labels of a classifier: their record is read all the same."""
    texts = Tensor(
        name="u", datatype=DataType.DATA_TYPE_BYTES, shape=[2, 1], data=encode_bytes([b"a", b"bcd"])
    )
    x = tensor("x", np.arange(2, dtype="<f4").reshape(2, 1), DataType.DATA_TYPE_FP32)
    record = PredictionBatch(codes=[Code.CODE_OK], rows=[2], inputs=[x], outputs=[texts])
    outputs = [TensorSpec(name="u", datatype=DataType.DATA_TYPE_BYTES, shape=[-1, 1])]
    seen = observe(record, Signature(outputs=outputs, batched=True))
    assert seen.numeric["prediction.length"].tolist() == [1, 3]
    assert seen.numeric["x"].tolist() == [0, 1]


def test_images_and_wide_rows_are_summarised_and_texts_measured() -> None:
    images = np.arange(2 * 4 * 4, dtype="<f4").reshape(2, 4, 4)
    wide = np.ones((2, MAX_COLUMNS + 1), dtype="<f4")
    text = Tensor(
        name="text", datatype=DataType.DATA_TYPE_BYTES, shape=[2], data=encode_bytes([b"four", b"longer"])
    )
    record = PredictionBatch(
        codes=[Code.CODE_OK],
        rows=[2],
        inputs=[
            tensor("image", images, DataType.DATA_TYPE_FP32),
            tensor("wide", wide, DataType.DATA_TYPE_FP32),
            text,
        ],
    )
    seen = observe(record, Signature(batched=True))
    assert seen.numeric["image.mean"].tolist() == [7.5, 23.5]
    assert seen.numeric["image.max"].tolist() == [15, 31]
    assert seen.numeric["wide.std"].tolist() == [0, 0]
    assert seen.numeric["text.length"].tolist() == [4, 6]


def test_a_tensor_shorter_than_it_says_is_an_error() -> None:
    record = batch([Code.CODE_OK], [2], [Origin.ORIGIN_ONLINE])
    record.inputs[0].data = record.inputs[0].data[:-1]
    with pytest.raises(InvalidArgument, match="do not fill"):
        observe(record, SIGNATURE)


def test_rows_of_batch_jobs_count_unless_their_owner_wants_them_out() -> None:
    counted = batch([Code.CODE_OK], [3], [Origin.ORIGIN_BATCH])
    kept_out = batch([Code.CODE_OK], [3], [Origin.ORIGIN_BATCH])
    kept_out.exclude_from_drift = True

    assert observe(counted, SIGNATURE).rows == 3
    assert observe(kept_out, SIGNATURE).rows == 0
    # Read together, each keeps its own flag.
    both = [Numbered(index, one) for index, one in enumerate([counted, kept_out, kept_out, counted])]
    assert [run.rows for run in observe_all(both, SIGNATURE)] == [3, 0, 3]
