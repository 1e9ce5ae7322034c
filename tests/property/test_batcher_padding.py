"""Rows of different lengths in one run: every request gets what it would have got alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import DataType, Signature, Tensor, TensorSpec
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.backends.port import Padding
from services.worker.execution import Runner
from services.worker.input_layout import InputLayout
from services.worker.item import Answer, Batch, Item, Release
from services.worker.prediction_log import PayloadPolicy, PredictionRecords, entries_of
from services.worker.record_columns import Answered
from services.worker.replies import Replies
from services.worker.tensors import Array, to_array

FP32, INT64, BYTES = DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_INT64, DataType.DATA_TYPE_BYTES
SIGNATURE = Signature(
    inputs=[
        TensorSpec(name="tokens", datatype=INT64, shape=[-1, -1]),
        TensorSpec(name="vectors", datatype=FP32, shape=[-1, 2, -1]),
        TensorSpec(name="scale", datatype=FP32, shape=[-1]),
    ],
    outputs=[
        TensorSpec(name="running", datatype=INT64, shape=[-1, -1]),
        TensorSpec(name="pairs", datatype=INT64, shape=[-1, -1, -1]),
        TensorSpec(name="mean", datatype=FP32, shape=[-1, 2]),
        TensorSpec(name="words", datatype=BYTES, shape=[-1, -1]),
    ],
    batched=True,
)
PAD = -1


class Masked:
    """Looks only back, and leaves out where `tokens` is the pad. Counts its runs."""

    device = "cpu"
    padding = Padding(
        {"tokens": (0, np.int64(PAD).tobytes()), "vectors": (1, np.float32(9e9).tobytes())},
        {"running": (0,), "pairs": (0, 1), "mean": (), "words": (0,)},
    )

    def __init__(self) -> None:
        self.runs = 0

    def run(self, inputs: Mapping[str, Array], _outputs: Sequence[str]) -> dict[str, Array]:
        self.runs += 1
        tokens = inputs["tokens"]
        mask = tokens != PAD
        vectors = np.where(mask[:, None, :], inputs["vectors"], 0) * inputs["scale"][:, None, None]
        texts = np.array([[b"%d" % token for token in row] for row in tokens], dtype=object)
        return {
            "running": np.cumsum(tokens, axis=1),
            "pairs": tokens[:, :, None] * tokens[:, None, :],
            # Whole numbers, so that the order of adding cannot show.
            "mean": vectors.sum(axis=2) / mask.sum(axis=1, keepdims=True),
            "words": texts.reshape(tokens.shape),
        }

    def close(self) -> None: ...


def request(number: int, rows: int, length: int) -> PredictRequest:
    rng = np.random.default_rng(number)
    tensors: dict[str, tuple[DataType, Array]] = {
        "tokens": (INT64, rng.integers(0, 100, (rows, length)).astype(np.int64)),
        "vectors": (FP32, rng.integers(0, 100, (rows, 2, length)).astype(np.float32)),
        "scale": (FP32, np.full(rows, 1 + number % 3, np.float32)),
    }
    return PredictRequest(
        id=number,
        request_id=bytes([number]) * 16,
        inputs=[
            Tensor(name=name, datatype=datatype, shape=array.shape, data=array.tobytes())
            for name, (datatype, array) in tensors.items()
        ],
    )


def item_of(layout: InputLayout, asked: PredictRequest) -> Item:
    def ignore(_request: PredictRequest, _answer: Answer) -> None: ...

    rows, key, data = layout.take(asked)
    return Item(asked, rows, key, data, float("inf"), ignore)


def answers(runner: Runner, items: list[Item]) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
    """What each request is answered, and the inputs as the prediction log has them, in order of requests."""
    execution = runner.execute(Batch(items, sum(item.rows for item in items), Release.TURN), 64)
    assert execution.failures == []
    times = Answered(0.0, 0.0, 0, 1)
    replies = Replies("1", batched=True)
    found: dict[int, list[Tensor]] = {}
    for part in execution.parts:
        for item, reply in zip(part.items, replies.of_part(part, times), strict=True):
            found[item.request.id] = list(PredictReply.FromString(reply).outputs)
    records = PredictionRecords("w", "net", "1", "sha256:0", runner.layout)
    logged: dict[int, Tensor] = {}
    entries = [entry for part in execution.parts for entry in entries_of(part)]
    for value in records.of_entries(entries, times, PayloadPolicy()).records:
        record = PredictionBatch.FromString(value)
        tokens = to_array(record.inputs[0].data, INT64, record.inputs[0].shape)
        first = 0
        for number, rows in enumerate(record.rows):
            own = tokens[first : first + rows]
            logged[record.request_ids[16 * number]] = Tensor(shape=own.shape, data=own.tobytes())
            first += rows
    return found, [logged[item.request.id] for item in items]


@settings(max_examples=150, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=12))
def test_together_is_as_alone(shapes: list[tuple[int, int]]) -> None:
    backend = Masked()
    layout = InputLayout(SIGNATURE, backend.padding)
    runner = Runner(backend, SIGNATURE, layout)
    asked = [request(number, rows, length) for number, (rows, length) in enumerate(shapes)]
    items = [item_of(layout, one) for one in asked]
    assert len({item.key for item in items}) == 1
    together, logged = answers(runner, items)
    assert backend.runs == 1
    # Without padding, one request at a time.
    plain = InputLayout(SIGNATURE)
    for one, tensor in zip(asked, logged, strict=True):
        alone, _ = answers(Runner(Masked(), SIGNATURE, plain), [item_of(plain, one)])
        assert together[one.id] == alone[one.id]
        assert list(tensor.shape) == list(one.inputs[0].shape)
        assert tensor.data == one.inputs[0].data


def test_an_output_of_another_length_than_declared_costs_the_sharing_not_the_answer() -> None:
    class Lying(Masked):
        padding = Padding(Masked.padding.inputs, {**Masked.padding.outputs, "mean": (0,)})

    backend = Lying()
    layout = InputLayout(SIGNATURE, backend.padding)
    items = [item_of(layout, request(number, 1, length)) for number, length in enumerate([3, 5])]
    found, _ = answers(Runner(backend, SIGNATURE, layout), items)
    assert backend.runs == 3
    assert [list(found[number][0].shape) for number in range(2)] == [[1, 3], [1, 5]]


def test_empty_rows_are_not_merged() -> None:
    layout = InputLayout(SIGNATURE, Masked.padding)
    assert not layout.is_ragged(item_of(layout, request(0, 2, 0)).key)
    assert layout.is_ragged(item_of(layout, request(0, 2, 1)).key)
