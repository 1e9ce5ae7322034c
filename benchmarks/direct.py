"""ONNX Runtime without a server: the least that an answer costs, the most rows that a second holds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from benchmarks.workload import Workload

BATCHES = (1, 8, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Direct:
    """`p50_us` of one request's rows; rows/s by batch size."""

    p50_us: float
    p99_us: float
    rows_per_s: dict[int, float]

    @property
    def best_rows_per_s(self) -> float:
        """At the best batch."""
        return max(self.rows_per_s.values())


def measure_direct(workload: Workload, seconds: float) -> Direct:
    """Call `session.run` in a loop, on one thread."""
    session, name = workload.session(0), workload.input
    times = []
    until = time.perf_counter() + seconds
    number = 0
    while (started := time.perf_counter()) < until:
        session.run([workload.output], {name: workload.inputs[number % len(workload.inputs)]})
        times.append(time.perf_counter() - started)
        number += 1
    times.sort()
    rates = {}
    for batch in BATCHES:
        rows = np.resize(workload.inputs.reshape(-1, *workload.row_shape), (batch, *workload.row_shape))
        runs, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds / len(BATCHES):
            session.run([workload.output], {name: rows})
            runs += 1
        rates[batch] = runs * batch / (time.perf_counter() - started)
    return Direct(times[len(times) // 2] * 1e6, times[int(len(times) * 0.99)] * 1e6, rates)
