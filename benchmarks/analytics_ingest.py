"""Rows a second that one core of analytics turns from records of the prediction log into Parquet, and how
long a question to the store takes: `python -m benchmarks.analytics_ingest [--rows N]`.

Records are as workers write them: columnar, with inputs of 30 float32 features and an int64 answer a row.
Times are CPU seconds of this process (parsing, columns, sorting, compression), without broker and database.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from headrace.v1.dataplane_pb2 import Origin
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Tensor

from services.analytics import queries
from services.analytics.columns import layout, parse, to_table
from services.analytics.comparison import compare
from services.analytics.segments import encode
from services.common.ids import new_id

FEATURES = 30


def records(rows: int, a_record: int, rng: np.random.Generator) -> list[bytes]:
    """Serialized records of together `rows` requests."""
    made = []
    for _ in range(rows // a_record):
        x = rng.normal(size=(a_record, FEATURES)).astype("<f4")
        y = rng.integers(0, 2, a_record).astype("<i8")
        version = "2" if rng.random() < 0.1 else "1"
        batch = PredictionBatch(
            batch_id=new_id(),
            source="worker-1",
            writer=PredictionBatch.WRITER_WORKER,
            model="cancer",
            version=version,
            artifact_digest="sha256:" + "ab" * 32,
            answered_at_us=time.time_ns() // 1000,
            request_ids=b"".join(new_id() for _ in range(a_record)),
            unit_hashes=rng.integers(0, 50_000, a_record).tolist(),
            variants=[0] * a_record,
            variant_names=[version],
            propensities=[0.1 if version == "2" else 0.9] * a_record,
            revisions=[1] * a_record,
            codes=[Code.CODE_OK] * a_record,
            origins=[Origin.ORIGIN_ONLINE] * a_record,
            attempts=[0] * a_record,
            cached=[False] * a_record,
            latency_us=rng.integers(500, 5_000, a_record).tolist(),
            queue_us=[100] * a_record,
            compute_us=[50] * a_record,
            rows=[1] * a_record,
            inputs=[Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=x.shape, data=x.tobytes())],
            outputs=[Tensor(name="y", datatype=DataType.DATA_TYPE_INT64, shape=y.shape, data=y.tobytes())],
        )
        made.append(batch.SerializeToString())
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    pa.set_cpu_count(1)
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        files: list[str] = []
        to_table([parse(records(1, 1, rng)[0])])  # the first call imports what pyarrow needs
        for a_record in (1, 8, 32, 128):
            values = records(max(rows // 8, a_record) if a_record == 1 else rows, a_record, rng)
            taken = len(values) * a_record
            started = time.process_time()
            batches = [parse(value) for value in values]
            parsed = time.process_time()
            groups: dict[str, list[PredictionBatch]] = {}
            for batch in batches:
                groups.setdefault(batch.version, []).append(batch)
            tables = {version: to_table(members) for version, members in groups.items()}
            columned = time.process_time()
            for version, table in tables.items():
                members = groups[version]
                _, data = encode(table, version, layout(members[0]), [batch.batch_id for batch in members])
                file = Path(folder) / f"{a_record}-{version}.parquet"
                file.write_bytes(data)
                files.append(str(file))
            ended = time.process_time()
            print(
                f"{a_record:4d} requests a record: {taken / (ended - started):10,.0f} rows/s a core "
                f"(parse {parsed - started:.2f} s, columns {columned - parsed:.2f} s, "
                f"Parquet {ended - columned:.2f} s for {taken:,} rows)"
            )
        started = time.perf_counter()
        with queries.open_snapshot(queries.Snapshot(files=files)) as connection:
            found = queries.summary(connection)
        total = sum(row["requests"] for row in found)
        print(f"summary of {total:,} requests: {time.perf_counter() - started:.2f} s")
        started = time.perf_counter()
        with queries.open_snapshot(queries.Snapshot(files=files)) as connection:
            result = compare(queries.arms(connection, "latency_ms", "1", "2"), "latency_ms", ("1", "2"))
        took = time.perf_counter() - started
        print(f"comparison of {result.a.units + result.b.units:,} units: {took:.2f} s")


if __name__ == "__main__":
    main()
