"""First runs of a freshly loaded version: they prove that it works and measure how long it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from services.worker.backends.port import LoadFailed
from services.worker.best_batch import UNMEASURED, BestBatch, measured
from services.worker.execution import Runner
from services.worker.input_layout import InputLayout
from services.worker.run_time import RunTime

# Sizes tried for dimensions that the signature leaves open; 224 is what image models are made for.
_OPEN_SIZES = (1, 16, 64, 224)
_RUNS = 5
# No size is measured for longer than this many seconds after its first run.
_MEASURE_S = 0.5
# What is not run to find the best batch: inputs with more bytes than this.
_MOST_BYTES = 16 << 20
# Copying what came from a socket to where other rows are, into memory that is new or was another's meanwhile.
# Beside a server at work an image of 602 kB took 100 to 120 µs; alone, and again and again, it takes 15.
_JOIN_S_PER_BYTE = 0.2e-9


@dataclass(frozen=True, slots=True)
class WarmUp:
    """`ran` is False where no synthetic input fits a model with open dimensions; `reason` says what
    failed. `best` is the batch that jobs are cut for."""

    ran: bool
    reason: str = ""
    best: BestBatch = UNMEASURED


def warm_up(runner: Runner, layout: InputLayout, max_rows: int, run_time: RunTime) -> WarmUp:
    """Run one row and `max_rows` rows, several times each, and teach `run_time`; then batches of growing
    size. Blocking.

    Raises LoadFailed when a model with a fixed shape cannot run, or answers with the wrong number of rows."""
    failure: Exception | None = None
    for size in _OPEN_SIZES if layout.variable else (1,):
        try:
            _measure(runner, layout, max_rows if layout.batched else 1, run_time, size)
        except Exception as error:  # a backend may raise anything
            failure = error
        else:
            return WarmUp(ran=True, best=_best(runner, layout, size))
    reason = str(failure).strip().splitlines()[0][:300] if str(failure).strip() else type(failure).__name__
    if layout.variable:
        return WarmUp(ran=False, reason=reason)
    raise LoadFailed(f"the model fails on an input of zeros: {reason}") from failure


def _measure(runner: Runner, layout: InputLayout, max_rows: int, run_time: RunTime, size: int) -> None:
    # Two sizes even where batches have one row, which then run one after the other: a single size would say
    # nothing about larger ones.
    for rows in (1, max(2, max_rows)) if layout.batched else (1,):
        key, data = layout.synthetic(rows, size)
        runner.run(key, data, rows, max_rows)  # the first run allocates; it is not what later ones take
        until = time.monotonic() + _MEASURE_S
        for _ in range(_RUNS):
            started = time.monotonic()
            runner.run(key, data, rows, max_rows)
            ended = time.monotonic()
            run_time.observe(rows, ended - started, ended)
            if ended > until:
                break


def _best(runner: Runner, layout: InputLayout, size: int) -> BestBatch:
    def run(rows: int) -> float | None:
        if rows > 1 and not layout.batched:
            return None
        key, data = layout.synthetic(rows, size)
        if rows > 1 and sum(len(one) for one in data) > _MOST_BYTES:
            return None
        started = time.perf_counter()
        try:
            runner.run(key, data, rows, rows)
        except Exception:  # some models have a largest batch
            return None
        return time.perf_counter() - started

    row_bytes = sum(len(one) for one in layout.synthetic(1, size)[1])
    # A device gets its own copy of all rows anyway.
    joining = row_bytes * _JOIN_S_PER_BYTE if runner.backend.device == "cpu" else 0.0
    return measured(run, fixed=layout.fixed, joining=joining)
