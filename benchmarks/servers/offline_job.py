"""One file of rows through a model without a platform: `python -m benchmarks.servers.offline_job WAY MODEL
INPUT OUTPUT BATCH`, run in the environment of the way. Prints seconds as JSON; imports are not counted.

`ort`: pyarrow and ONNX Runtime in a loop over row groups. `pandas`: the whole file as a frame. `ray`: Ray
Data, as its guide on batch inference has it."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

LABEL, PROBABILITIES = "label", "probabilities"


def session(model: str) -> ort.InferenceSession:
    """One intra-op thread, as a run of the worker has."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def by_arrow(model: str, source: str, target: str, batch: int) -> float:
    """Row group after row group, in one thread."""
    import pyarrow as pa  # noqa: PLC0415 - each way imports what its environment has
    import pyarrow.parquet as pq  # noqa: PLC0415

    loaded = session(model)
    name = loaded.get_inputs()[0].name
    began = time.perf_counter()
    file = pq.ParquetFile(source)
    writer = None
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, use_threads=False)
        rows = np.empty((table.num_rows, table.num_columns), np.float32)
        for at, column in enumerate(table.columns):
            rows[:, at] = column.to_numpy()
        parts = [
            loaded.run([LABEL, PROBABILITIES], {name: rows[first : first + batch]})
            for first in range(0, len(rows), batch)
        ]
        answers = pa.table(
            {
                LABEL: np.concatenate([part[0] for part in parts]),
                PROBABILITIES: pa.FixedSizeListArray.from_arrays(
                    np.concatenate([part[1] for part in parts]).reshape(-1), 2
                ),
            }
        )
        writer = writer or pq.ParquetWriter(target, answers.schema)
        writer.write_table(answers)
    if writer is not None:
        writer.close()
    return time.perf_counter() - began


def by_pandas(model: str, source: str, target: str, batch: int) -> float:
    """The frame in memory, in batches."""
    import pandas as pd  # noqa: PLC0415 - each way imports what its environment has

    loaded = session(model)
    name = loaded.get_inputs()[0].name
    began = time.perf_counter()
    rows = pd.read_parquet(source).to_numpy(np.float32)
    parts = [
        loaded.run([LABEL, PROBABILITIES], {name: rows[first : first + batch]})
        for first in range(0, len(rows), batch)
    ]
    answers = pd.DataFrame(
        {
            LABEL: np.concatenate([part[0] for part in parts]),
            PROBABILITIES: list(np.concatenate([part[1] for part in parts])),
        }
    )
    answers.to_parquet(target)
    return time.perf_counter() - began


def by_ray(model: str, source: str, target: str, batch: int) -> float:
    """`read_parquet`, `map_batches` with one actor, `write_parquet`; the cluster is up before the clock."""
    import ray  # noqa: PLC0415 - each way imports what its environment has

    class Predictor:
        def __init__(self) -> None:
            self.loaded = session(model)
            self.input = self.loaded.get_inputs()[0].name

        def __call__(self, columns: dict[str, Any]) -> dict[str, Any]:
            rows = np.stack(list(columns.values()), axis=1).astype(np.float32, copy=False)
            label, probabilities = self.loaded.run([LABEL, PROBABILITIES], {self.input: rows})
            return {LABEL: label, PROBABILITIES: probabilities}

    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    began = time.perf_counter()
    answers = ray.data.read_parquet(source).map_batches(
        Predictor, batch_size=batch, concurrency=1, batch_format="numpy"
    )
    answers.write_parquet(target)
    return time.perf_counter() - began


def main() -> None:
    way, model, source, target, batch = sys.argv[1:]
    took = {"ort": by_arrow, "pandas": by_pandas, "ray": by_ray}[way](model, source, target, int(batch))
    written = [Path(target)] if Path(target).is_file() else list(Path(target).glob("*.parquet"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": took, "files": len(written), "peak_rss": peak}))


if __name__ == "__main__":
    main()
