"""The promises of benchmarks/STATISTICS.md in small: seeded, with limits that chance alone keeps to."""

import math

import numpy as np
import pytest

from benchmarks.trial_simulations import (
    ALPHA,
    World,
    adjusted,
    coverage,
    false_positives,
    fixed_power,
    look_at,
    means,
    planned_looks,
    quantile_coverage,
    ratios,
    sequential_power,
    shares,
    sizes_of,
)
from services.analytics.lifts import lift


@pytest.mark.parametrize("world", [shares(0.02, 0.1), means(0.2), ratios(0.2)], ids=lambda world: world.name)
def test_the_quick_look_is_what_results_show(world: World) -> None:
    whole = world.draw(np.random.default_rng(0), 500)
    for size in sizes_of(500, 4):
        quick = look_at(whole, size, 1_000.0)
        shown = lift(whole.where(np.arange(1_000) < 2 * size), alpha=ALPHA, tuning=1_000.0)
        assert shown is not None
        low, high = shown.sequence.interval
        assert quick.p_value == pytest.approx(shown.fixed.p_value)
        assert quick.radius * quick.std_error == pytest.approx((high - low) / 2)
        assert quick.outside(0.0) == (low > 0 or high < 0)


def slack(share: float, runs: int) -> float:
    """Three and a half standard errors."""
    return 3.5 * math.sqrt(share * (1 - share) / runs)


@pytest.mark.parametrize("world", [shares(0.2, 0.2), ratios()], ids=lambda world: world.name)
def test_peeking_makes_false_positives_but_not_of_the_deciding_method(world: World) -> None:
    found = false_positives(world, runs=200, units=1_000, seed=1)
    assert found.deciding <= 0.05
    assert found.naive > 0.12
    assert found.fixed <= 0.05 + slack(0.05, 200)


def test_tests_find_the_planned_effect_as_often_as_planned() -> None:
    for _, _, found in fixed_power(runs=2_000, seed=2):
        assert found == pytest.approx(0.8, abs=slack(0.8, 2_000))


def test_looking_all_the_time_finds_it_at_its_own_planned_size() -> None:
    _, found = sequential_power(runs=50, seed=3)
    assert found >= 0.8 - slack(0.8, 50)


@pytest.mark.parametrize("name", ["O'Brien-Fleming", "Pocock"])
def test_planned_looks_keep_their_error_rate(name: str) -> None:
    wrong, right = planned_looks(name, runs=20_000, seed=4)
    assert wrong == pytest.approx(0.05, abs=slack(0.05, 20_000))
    assert right > 0.65


@pytest.mark.parametrize(
    ("world", "units"),
    [(shares(0.1, 0.12), 150), (means(0.1), 300), (ratios(0.1), 200), (adjusted(0.05), 200)],
    ids=lambda given: getattr(given, "name", str(given)),
)
def test_intervals_cover_the_truth(world: World, units: int) -> None:
    seen = coverage(world, runs=200, units=units, seed=5, looks=3)
    for fixed in (seen.fixed, seen.relative):
        assert fixed == pytest.approx(0.95, abs=slack(0.95, 200))
    assert seen.sequence >= 0.95
    assert seen.relative_sequence >= 0.95


def test_quantiles_cover_the_truth() -> None:
    fixed, always = quantile_coverage(0.5, runs=60, units=1_000, seed=6, looks=3)
    assert fixed >= 0.95 - slack(0.95, 60)
    assert always >= 0.95
