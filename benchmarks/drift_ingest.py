"""Rows per second and core that drift takes in: parsing, drawing, columns, sketches, windows; without broker
and database. `python -m benchmarks.drift_ingest`

Record by record is how it was done first; joined is what the consumer does with a delivery.
"""

from __future__ import annotations

import time

import numpy as np
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Signature, Task, Tensor, TensorSpec

from services.common.ids import new_id
from services.drift.evaluation import Thresholds
from services.drift.reading import Numbered, observe_all
from services.drift.stream import Cadence, Stream

FEATURES = 30
ROWS = 60_000
CADENCE = Cadence(pane_s=1.0, sample_rows=2_000)
SIGNATURE = Signature(
    inputs=[
        TensorSpec(name="x", datatype=DataType.DATA_TYPE_FP32, columns=[f"f{i}" for i in range(FEATURES)])
    ],
    batched=True,
    task=Task.TASK_CLASSIFICATION,
    prediction_output="label",
)


def record(rng: np.random.Generator, rows: int, at_us: int) -> bytes:
    """One executed batch of `rows` requests, at 10,000 requests a second."""
    x = rng.normal(size=(rows, FEATURES)).astype("<f4")
    label = rng.integers(0, 2, rows).astype("<i8")
    return PredictionBatch(
        batch_id=new_id(),
        model="m",
        version="1",
        answered_at_us=at_us,
        codes=[Code.CODE_OK] * rows,
        rows=[1] * rows,
        inputs=[Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=x.shape, data=x.tobytes())],
        outputs=[Tensor(name="label", datatype=DataType.DATA_TYPE_INT64, shape=[rows], data=label.tobytes())],
    ).SerializeToString()


def rate(records: list[bytes], rows: int, delivery: int) -> float:
    """Rows per CPU second when `delivery` records are handled together."""
    stream = Stream()
    begun = time.process_time()
    for start in range(0, len(records), delivery):
        chunk = records[start : start + delivery]
        items = [Numbered(i, PredictionBatch.FromString(value)) for i, value in enumerate(chunk)]
        stream.feed(observe_all(items, SIGNATURE), CADENCE, Thresholds())
    return len(records) * rows / (time.process_time() - begun)


def main() -> None:
    """Print both ways, and their ratio, for records of several sizes."""
    rng = np.random.default_rng(0)
    for rows in (1, 8, 32, 128, 1_000):
        records = [record(rng, rows, n * rows * 100) for n in range(1, ROWS // rows // 8 + 1)]
        single, joined = rate(records, rows, 1), rate(records, rows, 500)
        ratio = joined / single
        print(f"{rows:4} rows a record: {single:8,.0f} rows/s alone, {joined:8,.0f} joined, {ratio:.1f}x")


if __name__ == "__main__":
    main()
