"""The line over rows that predicts run times."""

from __future__ import annotations

import pytest

from services.worker.run_time import RunTime


def test_learns_offset_and_slope() -> None:
    run_time = RunTime()
    for i in range(100):
        rows = 1 + i % 32
        run_time.observe(rows, 0.002 + 0.0001 * rows, i * 0.01)
    assert run_time.fixed == pytest.approx(0.002, rel=0.01)
    assert run_time.per_row == pytest.approx(0.0001, rel=0.01)
    assert run_time.estimate(64) == pytest.approx(0.0084, rel=0.01)


def test_keeps_its_slope_while_all_batches_have_one_size() -> None:
    run_time = RunTime()
    for i in range(20):
        run_time.observe(1 if i % 2 else 64, 0.001 if i % 2 else 0.0073, i)
    for i in range(3000):
        run_time.observe(64, 0.0073, 20 + i)
    assert run_time.estimate(64) == pytest.approx(0.0073, rel=0.01)
    assert run_time.estimate(1) == pytest.approx(0.001, rel=0.05)


def test_one_interrupted_run_changes_little_and_a_slower_model_is_noticed() -> None:
    run_time = RunTime()
    for i in range(50):
        run_time.observe(8, 0.0001, i)
    run_time.observe(8, 0.5, 51)
    assert run_time.estimate(8) < 0.0002
    for i in range(300):
        run_time.observe(8, 0.02, 52 + i)
    assert run_time.estimate(8) == pytest.approx(0.02, rel=0.05)


def test_the_floor_is_the_fastest_run_and_is_forgotten() -> None:
    run_time = RunTime()
    assert run_time.floor(0.0) == 0.0
    for i in range(10):
        run_time.observe(4, 0.003 + 0.001 * (i % 3), i * 0.1)
    assert run_time.floor(1.0) == pytest.approx(0.003)
    # Nobody was let in for a while, so nothing was measured: the next may try again.
    assert run_time.floor(100.0) == 0.0


def test_coefficients_never_become_negative() -> None:
    run_time = RunTime()
    for i in range(50):
        run_time.observe(1 + i % 10, 0.01 / (1 + i % 10), i)
    assert run_time.per_row >= 0
    assert run_time.fixed >= 0
    assert run_time.estimate(1000) >= 0
