"""The line over rows that predicts run times."""

from __future__ import annotations

import pytest

from services.worker.run_time import Pace, RunTime


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


def test_the_floor_follows_a_model_that_became_slower() -> None:
    run_time = RunTime()
    run_time.observe(4, 0.001, 1000.0)
    floors = {}
    for i in range(1, 25):
        now = 1000.0 + i / 2
        run_time.observe(4, 0.003, now)
        floors[now] = run_time.floor(now)
    assert floors[1004.5] == floors[1006.0] == 0.001
    assert floors[1012.0] > 0.0025
    assert run_time.floor(1020.5) > 0.0025
    assert run_time.floor(1021.5) == 0.0


def test_where_only_large_batches_ran_lately_one_row_may_still_be_quicker() -> None:
    run_time = RunTime()
    for i in range(100):
        rows = 1 + i % 32
        run_time.observe(rows, 0.002 + 0.0001 * rows, i * 0.01)
    for i in range(40):
        run_time.observe(64, 0.0084, 1.0 + i / 2)
    assert run_time.floor(21.0) == pytest.approx(0.0021, rel=0.01)


def test_a_larger_batch_than_ever_is_no_outlier() -> None:
    run_time = RunTime()
    for i in range(20):
        run_time.observe(1, 0.001, i)
    run_time.observe(64, 0.064, 20)
    assert run_time.estimate(64) == pytest.approx(0.064, rel=0.01)


@pytest.mark.parametrize("power", [-1, 2])
def test_coefficients_never_become_negative(power: int) -> None:
    run_time = RunTime()
    for i in range(50):
        run_time.observe(1 + i % 10, 0.01 * (1 + i % 10) ** power, i)
    assert run_time.per_row >= 0
    assert run_time.fixed >= 0
    assert run_time.estimate(1000) >= 0


def backlog(pace: Pace, first: float, releases: int) -> float:
    """Every second ten rows leave, and as many wait behind them; the time of the last release."""
    for i in range(releases):
        pace.left(10, first + i, 0.01, backlog=True)
    return first + releases - 1


def test_a_backlog_tells_the_pace_and_what_is_expected_counts_as_ten_measurements() -> None:
    pace = Pace()
    backlog(pace, 100.0, 1)
    assert pace.per_row(100.0, 0.01) == 0.01
    assert pace.per_row(backlog(pace, 101.0, 1), 0.01) == pytest.approx((10 * 0.01 + 0.1) / 11, rel=0.02)
    assert pace.per_row(backlog(pace, 102.0, 400), 0.01) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("how", ["none", "interrupted"])
def test_the_time_after_a_release_that_left_nothing_behind_says_nothing(how: str) -> None:
    pace = Pace()
    end = backlog(pace, 100.0, 400)
    if how == "none":
        pace.left(10, end + 1, 0.01, backlog=False)
        end += 1
    else:
        pace.interrupted()
    pace.left(10, end + 9, 0.01, backlog=True)
    assert pace.per_row(end + 9, 0.01) == pytest.approx(0.1, rel=0.01)
    assert pace.per_row(backlog(pace, end + 10, 1), 0.01) == pytest.approx(0.1, rel=0.01)


def test_a_pace_is_forgotten() -> None:
    pace = Pace()
    end = backlog(pace, 100.0, 400)
    assert pace.per_row(end + 9.9, 0.01) == pytest.approx(0.1, rel=0.01)
    assert pace.per_row(end + 10.1, 0.01) == 0.01
    pace.interrupted()
    assert pace.per_row(backlog(pace, end + 11, 2), 0.01) < 0.02
