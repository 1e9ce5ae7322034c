"""Results, errors and the log of a chunk as bytes: the same for the same rows, readable by everybody."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
from headrace.v1.batch_pb2 import BatchChunk
from headrace.v1.dataplane_pb2 import Origin
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Signature, TensorSpec

from services.common.bus.port import MAX_RECORD_BYTES
from services.common.errors import Internal, InvalidArgument
from services.common.tensors import to_array
from services.worker.batch.records import ChunkRecords, request_ids
from services.worker.batch.results import Answers, errors_bytes, output_shapes, results_bytes
from services.worker.tensors import Array
from tests.fixtures.batch import TABULAR, table_of


def answers(places: list[int], **outputs: Array) -> Answers:
    return Answers(np.array(places, np.int64), outputs)


def test_results_stand_in_the_order_of_the_rows() -> None:
    parts = [
        answers([0, 3], label=np.array([10, 13]), p=np.array([[0.5, 0.5], [0.25, 0.75]], np.float32)),
        answers([1], label=np.array([11]), p=np.array([[1, 0]], np.float32)),
    ]
    data = results_bytes(parts, 100, ["a", "b", "c", "d"], {"label": (), "p": (2,)})
    table = table_of(data)

    assert table.to_pydict() == {
        "row": [100, 101, 103],
        "custom_id": ["a", "b", "d"],
        "label": [10, 11, 13],
        "p": [[0.5, 0.5], [1, 0], [0.25, 0.75]],
    }
    assert table.schema.field("row").type == pa.uint64()
    assert table.schema.field("p").type == pa.list_(pa.float32(), 2)
    assert results_bytes(parts, 100, ["a", "b", "c", "d"], {"label": (), "p": (2,)}) == data
    assert results_bytes([], 100, None, {}) == b""


def test_the_type_of_a_column_follows_the_signature() -> None:
    signature = Signature(
        batched=True,
        outputs=[
            TensorSpec(name="tokens", datatype=DataType.DATA_TYPE_INT64, shape=[-1, -1, 2]),
            TensorSpec(name="text", datatype=DataType.DATA_TYPE_BYTES, shape=[-1]),
        ],
    )
    texts = np.array(["ä", "b"], object)
    parts = [
        answers([0], tokens=np.arange(4).reshape(1, 2, 2), text=texts[:1]),
        answers([1], tokens=np.arange(6).reshape(1, 3, 2), text=texts[1:]),
    ]
    table = table_of(results_bytes(parts, 0, None, output_shapes(signature)))

    assert table.schema.field("tokens").type == pa.list_(pa.list_(pa.int64(), 2))
    assert table.to_pydict() == {
        "row": [0, 1],
        "tokens": [[[0, 1], [2, 3]], [[0, 1], [2, 3], [4, 5]]],
        "text": ["ä", "b"],
    }


def test_batches_of_a_result_are_bounded() -> None:
    many = answers(list(range(20_000)), y=np.zeros(20_000, np.float32))
    reader = pa.ipc.open_stream(results_bytes([many], 0, None, {"y": ()}))
    assert [batch.num_rows for batch in reader] == [8192, 8192, 3616]


def test_errors_are_lines_in_the_order_of_the_rows() -> None:
    failures = {3: Internal("the model failed"), 1: InvalidArgument("x is wrong", field="inputs[11].x")}
    lines = errors_bytes(failures, 10, [None, "b", "c", None]).splitlines()

    assert [json.loads(line) for line in lines] == [
        {
            "row": 11,
            "custom_id": "b",
            "error": {"code": "INVALID_ARGUMENT", "message": "x is wrong", "field": "inputs[11].x"},
        },
        {"row": 13, "error": {"code": "INTERNAL", "message": "the model failed"}},
    ]


class TestRecords:
    chunk = BatchChunk(
        job_id="job", model="net", version="1", artifact_digest="sha256:1", first_row=1000,
        exclude_from_drift=True,
    )  # fmt: skip

    def made(self, count: int, payload_rows: int = 1 << 20) -> list[PredictionBatch]:
        x = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
        done = answers(list(range(count)), y=2 * x)
        records = ChunkRecords(self.chunk, TABULAR, "worker-0")
        return [
            PredictionBatch.FromString(value) for value in records.answered(done, {"x": x}, 7, payload_rows)
        ]

    def test_texts_count_as_long_as_they_are(self) -> None:
        signature = Signature(
            batched=True,
            inputs=[TensorSpec(name="text", datatype=DataType.DATA_TYPE_BYTES, shape=[-1])],
            outputs=[TensorSpec(name="y", datatype=DataType.DATA_TYPE_FP32, shape=[-1])],
        )
        records = ChunkRecords(self.chunk, signature, "worker-0")
        for length, logged in ((1000, True), (4000, False)):
            texts = np.full(4000, b"x" * length, object)
            done = answers(list(range(4000)), y=np.zeros(4000, np.float32))
            (value,) = records.answered(done, {"text": texts}, 7, 8192)
            assert len(value) <= MAX_RECORD_BYTES
            made = PredictionBatch.FromString(value)
            assert (len(made.codes), bool(made.inputs), bool(made.outputs)) == (4000, logged, logged)

    def test_every_row_is_a_request_of_its_own(self) -> None:
        first, second = self.made(10_000)

        assert (len(first.codes), len(second.codes)) == (8192, 1808)
        assert set(first.codes) == {Code.CODE_OK}
        assert set(first.origins) == {Origin.ORIGIN_BATCH}
        assert set(first.rows) == {1}
        assert first.request_ids + second.request_ids == request_ids("job", np.arange(1000, 11_000))
        assert (first.exclude_from_drift, first.exclude_from_experiments) == (True, False)
        assert (first.model, first.version, first.artifact_digest) == ("net", "1", "sha256:1")
        x = to_array(second.inputs[0].data, second.inputs[0].datatype, second.inputs[0].shape)
        y = to_array(second.outputs[0].data, second.outputs[0].datatype, second.outputs[0].shape)
        assert x.shape == (1808, 3)
        assert (y == 2 * x).all()

    def test_ids_are_the_same_when_the_chunk_is_done_again_and_differ_by_row_and_job(self) -> None:
        assert [record.batch_id for record in self.made(9000)] == [r.batch_id for r in self.made(9000)]
        ids = request_ids("job", np.arange(100)) + request_ids("other", np.arange(100))
        assert len({ids[at : at + 16] for at in range(0, len(ids), 16)}) == 200

    def test_only_the_first_rows_carry_their_tensors(self) -> None:
        first, second = self.made(10_000, payload_rows=8192)
        assert (len(first.inputs), len(second.inputs), len(second.codes)) == (1, 0, 1808)

    def test_they_do_though_one_of_them_failed(self) -> None:
        places = [place for place in range(10_000) if place != 3]
        x = np.arange(len(places) * 3, dtype=np.float32).reshape(-1, 3)
        records = ChunkRecords(self.chunk, TABULAR, "worker-0")
        made = [
            PredictionBatch.FromString(value)
            for value in records.answered(answers(places, y=2 * x), {"x": x}, 7, 8192)
        ]

        assert [(len(one.codes), len(one.inputs), len(one.outputs)) for one in made] == [
            (8191, 1, 1),
            (1808, 0, 0),
        ]
        assert b"".join(one.request_ids for one in made) == request_ids("job", np.array(places) + 1000)

    def test_rows_that_failed_are_there_without_tensors(self) -> None:
        records = ChunkRecords(self.chunk, TABULAR, "worker-0")
        (value,) = records.failed({5: Internal("x"), 2: InvalidArgument("y")}, 7)
        record = PredictionBatch.FromString(value)

        assert list(record.codes) == [Code.CODE_INVALID_ARGUMENT, Code.CODE_INTERNAL]
        assert record.request_ids == request_ids("job", np.array([1002, 1005]))
        assert not record.inputs
