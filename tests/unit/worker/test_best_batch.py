"""The batch that jobs are cut for."""

from __future__ import annotations

import pytest

from services.worker.best_batch import best_batch
from services.worker.run_time import RunTime


def learned(fixed_s: float, per_row_s: float) -> RunTime:
    run_time = RunTime()
    for at in range(50):
        for rows in (1, 8, 64):
            run_time.observe(rows, fixed_s + per_row_s * rows, float(at))
    return run_time


def test_nothing_is_said_before_anything_ran() -> None:
    assert best_batch(RunTime()) == (0, 0.0)


def test_a_fast_model_runs_in_batches_that_hide_its_fixed_cost() -> None:
    rows, rate = best_batch(learned(20e-6, 1e-6))
    assert rows == 256
    assert rate == pytest.approx(rows / (20e-6 + rows * 1e-6), rel=1e-3)


def test_a_slow_model_runs_in_batches_that_online_requests_can_wait_for() -> None:
    rows, _rate = best_batch(learned(5e-3, 0.5e-3))
    assert rows == 8  # 10 would take 10 ms
    rows, rate = best_batch(learned(10e-3, 20e-3))
    assert rows == 4
    assert rate == pytest.approx(4 / 90e-3, rel=1e-3)


def test_a_model_whose_rows_cost_nothing_has_a_bound_too() -> None:
    rows, _rate = best_batch(learned(1e-3, 0.0))
    assert rows == 4096
