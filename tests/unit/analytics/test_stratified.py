"""One effect over strata: what it equals, what it is blind to, and when it says nothing."""

import math

import numpy as np
import pytest

from services.analytics.lifts import lift
from services.analytics.statistics.effects import Arm, effect
from services.analytics.statistics.moments import PairedMoments
from services.analytics.statistics.stratified import (
    Cells,
    half_width,
    log_evidence,
    stratified_effect,
)


def cells(
    arms: np.ndarray, totals: np.ndarray, strata: np.ndarray | None = None, **given: np.ndarray
) -> Cells:
    n = arms.size
    return Cells(
        given.get("units", np.arange(n)).astype(np.uint64),
        arms.astype(np.int64),
        np.zeros(n, dtype=np.int64) if strata is None else strata.astype(np.int64),
        totals.astype(np.float64),
        given.get("counts", np.ones(n)).astype(np.float64),
        given.get("covariate"),
    )


def test_one_stratum_is_the_delta_method() -> None:
    rng = np.random.default_rng(1)
    counts = rng.poisson(3, 4_000) + 1.0
    arms = rng.random(4_000) < 0.4
    totals = rng.binomial(counts.astype(int), np.where(arms, 0.3, 0.2)).astype(float)
    found = stratified_effect(cells(arms, totals, counts=counts))
    sides = [Arm.ratio(PairedMoments.of(totals[chosen], counts[chosen])) for chosen in (~arms, arms)]
    expected = effect(sides[0], sides[1])
    assert found is not None
    assert found.estimate == pytest.approx(expected.estimate, rel=1e-12)
    assert found.std_error == pytest.approx(expected.std_error, rel=0.05)
    assert (found.control_units, found.units) == (int((~arms).sum()), int(arms.sum()))
    assert found.size == pytest.approx(4 * arms.sum() * (~arms).sum() / 4_000)


def test_weights_that_grow_while_the_world_gets_worse_make_no_effect() -> None:
    rng = np.random.default_rng(2)
    strata = np.repeat([0, 1], 20_000)
    arms = rng.random(40_000) < np.where(strata == 0, 0.05, 0.5)
    values = rng.random(40_000) < np.where(strata == 0, 0.01, 0.10)
    found = stratified_effect(cells(arms, values, strata))
    pooled = values[arms].mean() - values[~arms].mean()
    assert found is not None
    assert pooled > 0.03  # what a comparison without strata would believe
    assert abs(found.estimate) < 3 * found.std_error < 0.02


def test_small_strata_seem_no_surer_than_they_are() -> None:
    """As a bandit makes them that moves its weights every minute."""
    rng = np.random.default_rng(8)
    strata = np.repeat(np.arange(100), 4)
    scores = []
    for _ in range(200):
        values = rng.normal(size=400) + rng.normal(0, 3, 100)[strata]
        found = stratified_effect(cells(rng.random(400) < 0.5, values, strata))
        assert found is not None
        scores.append(found.estimate / found.std_error)
    assert 0.85 < float(np.std(scores)) < 1.12  # 1.17 without what four units' mean takes from their spread


def test_a_unit_in_several_strata_counts_as_one() -> None:
    rng = np.random.default_rng(3)
    own = rng.normal(0, 1, 500)
    arms = np.arange(500) % 2
    once = stratified_effect(cells(arms, own))
    again = stratified_effect(
        cells(np.tile(arms, 4), np.tile(own, 4), np.repeat(range(4), 500), units=np.tile(np.arange(500), 4))
    )
    assert once is not None
    assert again is not None
    assert again.estimate == pytest.approx(once.estimate)
    assert again.std_error == pytest.approx(once.std_error, rel=0.02)
    assert again.units == once.units == 250


def test_a_covariate_from_before_takes_its_part_of_the_variance() -> None:
    rng = np.random.default_rng(4)
    before = rng.normal(5, 2, 4_000)
    arms = rng.random(4_000) < 0.5
    values = before + rng.normal(0, 1, 4_000) + 0.1 * arms
    before[:400] = np.nan  # who came later has none
    plain = stratified_effect(cells(arms, values))
    adjusted = stratified_effect(cells(arms, values, covariate=before))
    assert plain is not None
    assert adjusted is not None
    assert adjusted.theta == pytest.approx(1.0, abs=0.05)
    assert adjusted.std_error < 0.65 * plain.std_error
    assert abs(adjusted.estimate - 0.1) < 3 * adjusted.std_error


@pytest.mark.parametrize(
    ("units", "control_events", "events"), [(80, 40, 40), (2_000, 0, 0), (2_000, 4, 0), (150, 6, 0)]
)
def test_few_units_and_rare_events_prove_nothing(units: int, control_events: int, events: int) -> None:
    arms = np.repeat([0, 1], units)
    values = np.zeros(2 * units)
    values[:control_events] = values[units : units + events] = 1
    found = stratified_effect(cells(arms, values))
    assert found is not None
    assert not found.normal
    assert log_evidence(found, 0.0, above=False) == -math.inf
    assert math.isinf(half_width(found, 0.025))


def test_an_arm_in_which_it_never_happens_has_the_others_spread() -> None:
    arms = np.repeat([0, 1], [10_000, 2_000])
    values = np.zeros(12_000)
    values[:1_000] = 1
    found = stratified_effect(cells(arms, values))
    assert found is not None
    assert found.normal
    assert found.std_error == pytest.approx(math.sqrt(0.0764 * (1 / 10_000 + 1 / 2_000)), rel=0.02)
    assert log_evidence(found, 0.0, above=False) > math.log(80)
    assert half_width(found, 0.0125) > 2.24 * found.std_error


def test_values_too_large_to_be_added_are_no_effect_and_too_large_to_be_squared_no_proof() -> None:
    rng = np.random.default_rng(10)
    arms, strata = np.arange(600) % 2, np.arange(600) % 3
    assert stratified_effect(cells(arms, np.full(600, 1e308), strata)) is None
    squared = cells(arms, rng.normal(size=600) * 1e200, strata)
    with np.errstate(over="ignore", invalid="ignore"):
        found = stratified_effect(squared)
        assert found is not None
        assert log_evidence(found, 0.0, above=True) == -math.inf
        shown = lift(squared, alpha=0.05, tuning=1_000.0)
    assert shown is not None
    assert shown.relative is None


def test_no_stratum_with_both_arms_is_no_effect() -> None:
    assert stratified_effect(cells(np.zeros(5), np.ones(5))) is None
    assert stratified_effect(cells(np.array([0, 1]), np.ones(2), np.array([0, 1]))) is None
