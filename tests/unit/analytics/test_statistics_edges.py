"""What the functions say where there is little or nothing to say, and one-sided and unequal forms of them."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from services.analytics.arm_queries import Arms, Observations
from services.analytics.comparison import compare
from services.analytics.lifts import lift
from services.analytics.schemas import comparison_json
from services.analytics.statistics import bounded, counts, means, power, proportions, quantiles, sequential
from services.analytics.statistics.boundaries import BetaBinomialMixture
from services.analytics.statistics.effects import Arm, Difference, cuped, effect
from services.analytics.statistics.fixed_horizon import equivalence, non_inferiority, t_test, z_test
from services.analytics.statistics.moments import Moments, PairedMoments
from services.analytics.statistics.stratified import Cells, stratified_effect

SIZES = [1e-100, 1e78, 1e100, 1e150]
SIDES = [(0, 0), (0, 10), (10, 10), (3, 10), (1, 1)]


@pytest.mark.parametrize("control", SIDES)
@pytest.mark.parametrize("treatment", SIDES)
def test_proportions_never_divide_by_zero_nor_prove_anything_from_nothing(
    control: tuple[int, int], treatment: tuple[int, int]
) -> None:
    found = proportions.two_proportion_z_test(control, treatment)
    assert 0 <= found.p_value <= 1
    assert -1 <= found.wald_ci[0] <= found.wald_ci[1] <= 1
    arms = effect(Arm.proportion(*control), Arm.proportion(*treatment))
    if arms.std_error == 0:
        assert found.p_value == 1 or control != treatment
        assert non_inferiority(arms, -0.01).p_value == 1
        assert equivalence(arms, -0.01, 0.01).p_value == 1


def test_empty_samples_say_nothing() -> None:
    assert bounded.bernoulli(0, 0) == (0.0, 1.0)
    assert quantiles.quantile_p_value([], [1.0], 0.5, t_opt=100) == 1
    assert means.mann_whitney([], [1.0]).p_value == 1
    assert proportions.k_proportions([0, 0], [0, 0]).p_value == 1
    assert counts.contingency([[0, 0], [3, 4]]).p_value == 1
    assert counts.sample_ratio([0, 0], [1, 1]).p_value == 1


def test_units_in_an_arm_that_was_to_get_none_are_a_mismatch() -> None:
    assert sequential.sequential_sample_ratio([[5, 0], [50, 1]], [1, 0])[1].tolist() == [1.0, 0.0]


def test_one_sided_tests_are_halves_and_their_intervals_have_one_end() -> None:
    arms = effect(Arm(50, 1.0, 2.0), Arm(60, 1.5, 3.0))
    for test in (t_test, z_test):
        both, up, down = (test(arms, alternative=side) for side in ("two-sided", "larger", "smaller"))
        assert up.p_value == pytest.approx(both.p_value / 2)
        assert down.p_value == pytest.approx(1 - both.p_value / 2)
        assert up.ci[1] == math.inf
        assert up.ci[0] == pytest.approx(test(arms, alpha=0.1).ci[0])
        assert down.ci[0] == -math.inf
    low, high = sequential.one_sided_sequence(arms)
    wide = sequential.asymptotic_sequence(arms).ci
    assert wide[0] < low < t_test(arms, alternative="larger").ci[0]
    assert high - arms.estimate == pytest.approx(arms.estimate - low)


def test_pooled_and_paired_means_agree_with_scipy() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.normal(0, 1, 40), rng.normal(0.3, 2, 40)
    pooled = t_test(means.pooled_effect(Moments.of(a), Moments.of(b)))
    assert pooled.p_value == pytest.approx(stats.ttest_ind(b, a).pvalue)
    paired = t_test(means.paired_effect(Moments.of(b - a)), alternative="larger")
    assert paired.p_value == pytest.approx(stats.ttest_rel(b, a, alternative="greater").pvalue)


#: y is x, so nothing varies that it leaves unexplained; but a sum of products that was rounded up, as on some
#: processors, says that even less does.
SAME = PairedMoments(Moments(2, 3.0, 1.0), Moments(2, 3.0, 1.0), math.nextafter(1.0, 2.0))


@pytest.mark.parametrize("difference", ["absolute", "relative"])
def test_a_ratio_that_rounding_leaves_below_no_variance_has_none(difference: Difference) -> None:
    arm = Arm.ratio(SAME)
    assert (arm.mean, arm.variance) == (1.0, 0.0)
    assert effect(arm, arm, difference).std_error == 0.0


@pytest.mark.parametrize("difference", ["absolute", "relative"])
def test_an_adjustment_that_rounding_leaves_below_no_variance_leaves_none(difference: Difference) -> None:
    found = cuped(SAME, SAME, difference)
    assert found.unadjusted.std_error > 0
    assert found.adjusted.std_error == 0.0
    assert found.variance_reduction == 1.0


def test_anytime_quantile_is_the_least_favourable_common_point() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.poisson(20, 300).astype(float), rng.poisson(23, 200).astype(float)  # with ties
    p_value = quantiles.quantile_p_value(a, b, 0.9, t_opt=300)
    q = 0.9
    mixture = BetaBinomialMixture(300 * q * (1 - q), g=q, h=1 - q)

    def least(side: np.ndarray, point: float) -> float:
        """Of all shares below `point` that the ties there allow."""
        n = side.size
        counts_below = range(int((side < point).sum()), int((side <= point).sum()) + 1)
        return min(mixture.log(below - q * n, q * (1 - q) * n) for below in counts_below)

    points = np.unique(np.concatenate((a, b, a + 0.5)))
    smallest = min(least(a, point) + least(b, point) for point in points)
    assert p_value == pytest.approx(min(1.0, math.exp(-smallest)), rel=0.02)


def test_unequal_arms_need_more_units() -> None:
    even = power.sample_size_two_proportions(0.05, 0.055)
    uneven = power.sample_size_two_proportions(0.05, 0.055, ratio=0.25)
    assert uneven * 1.25 > even * 2
    assert power.power_two_proportions(uneven, 0.05, 0.055, ratio=0.25) == pytest.approx(0.8)
    size = power.sample_size_mean(0.2, 1.0, ratio=3.0)
    assert power.power_mean(size, 0.2, 1.0, ratio=3.0) == pytest.approx(0.8)


def test_the_power_for_a_very_large_effect_is_that_of_its_estimated_spread() -> None:
    """With two degrees of freedom, of which the squared spread is exponential. SciPy says 0.47."""
    critical = float(stats.t.isf(0.5e-11, 2))
    assert power.power_mean(2, critical, 1.0, alpha=1e-11) == pytest.approx(1 - math.exp(-1), rel=1e-6)
    assert power.power_mean(2, critical / 2, 1.0, alpha=1e-11) == pytest.approx(1 - math.exp(-0.25), rel=1e-6)


def test_the_least_detectable_effect_inverts_the_sample_size() -> None:
    size = power.sample_size_two_proportions(0.05, 0.055)
    assert power.detectable_proportion(size, 0.05) == pytest.approx(0.005, rel=1e-6)
    fall = power.sample_size_two_proportions(0.05, 0.046)
    assert power.detectable_proportion(fall, 0.05, rise=False) == pytest.approx(-0.004, rel=1e-6)
    assert power.detectable_proportion(3, 0.5) is None
    assert power.detectable_mean(power.sample_size_mean(0.1, 2.0), 2.0) == pytest.approx(0.1, rel=1e-6)
    assert power.sample_size_mean(100.0, 1.0) == 2


def cells(scale: float) -> Cells:
    n, rng = 400, np.random.default_rng(7)
    places = np.arange(n)
    return Cells(
        places.astype(np.uint64), places % 2, np.zeros(n, dtype=np.int64), rng.random(n) * scale, np.ones(n)
    )


@pytest.mark.parametrize("scale", SIZES)
def test_the_unit_of_a_value_changes_no_statement_however_large_it_is(scale: float) -> None:
    """Any float is an outcome: one that ends the arithmetic would end every look at its trial."""
    usual, scaled = stratified_effect(cells(1.0)), stratified_effect(cells(scale))
    assert usual is not None
    assert scaled is not None
    assert scaled.normal
    assert scaled.contributing == pytest.approx(usual.contributing)
    one, other = (lift(cells(size), alpha=0.05, tuning=5000.0) for size in (1.0, scale))
    assert one is not None
    assert other is not None
    assert other.relative == pytest.approx(one.relative)
    assert other.fixed.p_value == pytest.approx(one.fixed.p_value)
    assert other.fixed.relative_interval == pytest.approx(one.fixed.relative_interval)


@pytest.mark.parametrize("scale", [*SIZES, 1e200, 1e308])
def test_two_versions_are_compared_on_values_of_any_size(scale: float) -> None:
    values, arms = cells(scale), cells(scale).arms
    sides = [
        Observations(
            units=values.units[arms == arm],
            totals=values.totals[arms == arm],
            counts=values.counts[arms == arm],
            revisions=np.ones(200, dtype=np.uint64),
            propensities=np.full(200, 0.5),
            binary=False,
        )
        for arm in (0, 1)
    ]
    found = compare(Arms(sides[0], sides[1], 0), "revenue", ("a", "b"))
    assert (found.fixed is None) == (scale > 1e150)
    json.dumps(comparison_json("m", "revenue", found), allow_nan=False)
