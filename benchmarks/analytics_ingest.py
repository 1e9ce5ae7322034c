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

from benchmarks.logged import record
from services.analytics import arm_queries, queries
from services.analytics.columns import Logged, layout, parse, to_table
from services.analytics.comparison import compare
from services.analytics.segments import encode


def records(rows: int, a_record: int, rng: np.random.Generator) -> list[bytes]:
    """Serialized records of together `rows` requests."""
    return [record(rng, a_record).SerializeToString() for _ in range(rows // a_record)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    pa.set_cpu_count(1)
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        files: list[str] = []
        to_table([parse(records(1, 1, rng)[0])])  # the first call imports what pyarrow needs
        for a_record in (1, 8, 32, 128, 4096):
            values = records(max(rows // 8, a_record) if a_record == 1 else rows, a_record, rng)
            taken = len(values) * a_record
            started = time.process_time()
            logged = [Logged.of(parse(value), value) for value in values]
            parsed = time.process_time()
            groups: dict[str, list[Logged]] = {}
            for one in logged:
                groups.setdefault(one.batch.version, []).append(one)
            tables = {
                version: to_table([one.batch for one in members], "", [one.value for one in members])
                for version, members in groups.items()
            }
            columned = time.process_time()
            for version, table in tables.items():
                members = groups[version]
                ids = [one.batch_id for one in members]
                _, data = encode(table, version, layout(members[0].batch), ids)
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
            result = compare(arm_queries.arms(connection, "latency_ms", "1", "2"), "latency_ms", ("1", "2"))
        took = time.perf_counter() - started
        print(f"comparison of {result.a.units + result.b.units:,} units: {took:.2f} s")


if __name__ == "__main__":
    main()
