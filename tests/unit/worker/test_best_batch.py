"""The batch that jobs are cut for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from services.worker.best_batch import BestBatch, best_of, measured


def model(
    fixed_s: float, per_row_s: float, most: int = 1 << 20
) -> tuple[list[int], Callable[[int], float | None]]:
    """Every other run is interrupted for a while."""
    sizes: list[int] = []

    def run(rows: int) -> float | None:
        sizes.append(rows)
        return None if rows > most else fixed_s + per_row_s * rows + 0.0005 * (len(sizes) % 2)

    return sizes, run


def test_nothing_is_said_of_what_cannot_run() -> None:
    _sizes, run = model(1e-3, 1e-3, most=0)
    assert measured(run, fixed=True) == BestBatch()
    assert BestBatch().rows_within(1.0) == 0


def test_a_fast_model_runs_in_batches_that_hide_its_fixed_cost() -> None:
    _sizes, run = model(20e-6, 1e-6)
    best = measured(run, fixed=True)
    assert best.rows == 512  # 256 reach 93%, and 4096 what 95% is of
    assert best.rows_per_s == pytest.approx(512 / 532e-6)
    assert best.rows_within(0.003) == 512
    assert best.rows_within(1e-4) == 64


def test_what_runs_in_no_time_may_be_a_larger_batch() -> None:
    _sizes, run = model(20e-6, 0.4e-6)
    best = measured(run, fixed=True)
    assert (best.rows, best.quick_rows) == (1024, 2048)
    assert measured(run, fixed=False).quick_rows == 0  # rows may be larger than those
    assert measured(model(20e-6, 0.4e-6, most=100)[1], fixed=True).quick_rows == 64
    assert measured(model(1.2e-3, 0.0)[1], fixed=True).quick_rows == 0


def test_a_slow_model_runs_in_batches_that_online_requests_can_wait_for() -> None:
    _sizes, run = model(5e-3, 0.5e-3)
    assert measured(run, fixed=True).rows == 8  # 16 would take 13 ms
    sizes, run = model(10e-3, 20e-3)
    best = measured(run, fixed=True)
    assert best.rows == 4
    assert best.rows_per_s == pytest.approx(4 / 90.5e-3)
    assert max(sizes) == 4
    assert best.rows_within(0.003) == 1


def test_a_very_slow_model_is_not_measured_for_long() -> None:
    sizes, run = model(1.0, 1.0)
    assert measured(run, fixed=True).rows == 1
    assert sizes == [1]


def test_a_model_whose_rows_cost_nothing_has_a_bound_too() -> None:
    sizes, run = model(1e-3, 0.0)
    assert measured(run, fixed=True).rows == 4096
    assert max(sizes) == 4096


def test_rows_of_any_size_run_few_at_a_time() -> None:
    sizes, run = model(1e-3, 0.0)
    assert measured(run, fixed=False).rows == 32
    assert max(sizes) == 32


@pytest.mark.parametrize(
    ("joining", "fixed_s", "per_row_s", "apart"),
    [
        (0.0, 5e-6, 20e-6, False),
        (120e-6, 5e-6, 20e-6, True),  # an image, for which little is computed
        (20e-6, 5e-6, 20e-6, False),  # a batch of its own costs as much
        (120e-6, 130e-6, 20e-6, False),  # one run instead of many saves more
        (120e-6, 0.0, 600e-6, False),  # nobody would see it
    ],
)
def test_rows_run_apart_where_joining_them_costs_more_than_it_saves(
    joining: float, fixed_s: float, per_row_s: float, apart: bool
) -> None:
    fastest = {rows: fixed_s + per_row_s * rows for rows in (1, 2, 4, 8)}
    assert best_of(fastest, fixed=True, joining=joining).apart is apart
    assert not best_of(fastest, fixed=False, joining=joining).apart  # rows may be smaller than those


def test_a_model_with_a_largest_batch_is_measured_up_to_it() -> None:
    _sizes, run = model(1e-3, 1e-6, most=64)
    assert measured(run, fixed=True).rows == 64
