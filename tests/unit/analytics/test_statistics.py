"""What the published cases leave open: edges, other variants, and agreement between methods."""

import math

import numpy as np
import pytest
from scipy import stats

from services.analytics.statistics import (
    bayesian,
    boundaries,
    bounded,
    counts,
    group_sequential,
    means,
    multiple,
    policies,
    power,
    proportions,
    sequential,
)
from services.analytics.statistics.effects import Arm, cuped, effect
from services.analytics.statistics.fixed_horizon import equivalence, non_inferiority, t_test
from services.analytics.statistics.moments import Moments, PairedMoments


def test_welch_agrees_with_scipy() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, 50), rng.normal(0.4, 3, 80)
    ours, theirs = means.welch(Moments.of(a), Moments.of(b)), stats.ttest_ind(b, a, equal_var=False)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-10)
    assert ours.ci == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-9)


def test_arms_without_spread_or_units_do_not_divide_by_zero() -> None:
    same = t_test(effect(Arm(10, 1.0, 0.0), Arm(10, 1.0, 0.0)))
    assert (same.estimate, same.p_value, same.ci) == (0.0, 1.0, (0.0, 0.0))
    assert t_test(effect(Arm(10, 1.0, 0.0), Arm(10, 2.0, 0.0))).p_value == 0.0
    assert proportions.two_proportion_z_test((0, 5), (0, 7)).p_value == 1.0
    assert proportions.wilson(0, 0) == (0.0, 1.0)
    assert sequential.asymptotic_sequence(effect(Arm(0, 0.0, 0.0), Arm(0, 0.0, 0.0))).p_value == 1.0


def test_relative_effect_on_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="other than zero"):
        effect(Arm(10, 0.0, 1.0), Arm(10, 1.0, 1.0), "relative")


def test_relative_cuped_covers_the_true_lift() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        pre = rng.gamma(2, 3, 1200)
        post = 0.8 * pre + rng.normal(5, 2, 1200)
        post[600:] *= 1.02
        arms = [PairedMoments.of(post[side], pre[side]) for side in (slice(600), slice(600, None))]
        low, high = t_test(cuped(arms[0], arms[1], "relative").adjusted).ci
        covered += low <= 0.02 <= high
    assert 0.91 <= covered / 300 <= 0.985


def test_ratio_of_ones_is_the_mean() -> None:
    values = np.random.default_rng(3).normal(2, 1, 400)
    ratio = Arm.ratio(PairedMoments.of(values, np.ones(400)))
    plain = Arm.from_moments(Moments.of(values))
    assert (ratio.mean, ratio.variance) == pytest.approx((plain.mean, plain.variance))


def test_boundaries_hold_their_error_rate_on_a_random_walk() -> None:
    rng, crossed = np.random.default_rng(4), {"mixture": 0, "stitching": 0}
    times = np.arange(10, 2001)
    limits = {
        "mixture": np.array([boundaries.normal_mixture(float(t), 0.1, v_opt=200) for t in times]),
        "stitching": np.array([boundaries.poly_stitching(float(t), 0.05, v_min=10) for t in times]),
    }
    for _ in range(500):
        walk = np.abs(np.cumsum(rng.normal(0, 1, 2000)))[9:]
        for name, limit in limits.items():
            crossed[name] += bool(np.any(walk >= limit))
    assert 0 < crossed["mixture"] / 500 <= 0.13
    assert crossed["stitching"] / 500 <= 0.13


def test_mixture_boundaries_have_the_values_published_for_r() -> None:
    """At intrinsic time 100, tuned there, error 0.05: the targets of confseq's own tests, from R."""
    v, alpha = 100.0, 0.05
    beta_binomial = [
        boundaries.BetaBinomialMixture(100, g=0.2, h=0.8, one_sided=one_sided) for one_sided in (False, True)
    ]
    found = {
        30.35209: boundaries.normal_mixture(v, alpha, v_opt=100),
        27.66071: boundaries.normal_mixture(v, alpha, v_opt=100, one_sided=True),
        33.02017: boundaries.gamma_exponential(v, alpha, v_opt=100, c=2),
        30.1949: boundaries.gamma_poisson(v, alpha, v_opt=100, c=2),
        31.4308: beta_binomial[0].bound(v, alpha),
        28.41238: beta_binomial[1].bound(v, alpha),
        64.48755: boundaries.poly_stitching(v, alpha, v_min=10, c=3),
        28.99389: boundaries.poly_stitching(v, alpha, v_min=10, c=-1),
    }
    assert list(found.values()) == pytest.approx(list(found), abs=1e-4)
    assert beta_binomial[1].log(10, v) == pytest.approx(-0.07134019, abs=1e-6)


@pytest.mark.parametrize("c", [0.05, 1.0])
def test_gamma_boundaries_are_above_the_normal_one_and_near_it_for_small_scales(c: float) -> None:
    plain = boundaries.normal_mixture(500.0, 0.05, v_opt=500, one_sided=True)
    for other in (boundaries.gamma_exponential, boundaries.gamma_poisson):
        bound = other(500.0, 0.05, v_opt=500, c=c)
        assert bound > plain
        assert c > 0.5 or bound == pytest.approx(plain, rel=0.01)


def test_bernoulli_sequence_at_the_edges() -> None:
    low, high = bounded.bernoulli(0, 100)
    assert low == 0.0
    assert 0.0 < high < 0.2
    low, high = bounded.bernoulli(100, 100)
    assert 0.8 < low < 1.0
    assert high == 1.0


def test_betting_is_no_wider_than_empirical_bernstein_on_coins() -> None:
    x = np.random.default_rng(5).binomial(1, 0.1, 400).astype(float)
    (low, high), (low_eb, high_eb) = bounded.betting(x), bounded.empirical_bernstein(x)
    assert low[-1] <= 0.1 <= high[-1]
    assert high[-1] - low[-1] < high_eb[-1] - low_eb[-1]


def test_obrien_fleming_and_pocock_bounds_match_published_tables() -> None:
    fractions = [0.2, 0.4, 0.6, 0.8, 1.0]
    strict = group_sequential.bounds(
        fractions, spending=group_sequential.obrien_fleming_spending, sides=1, alpha=0.025
    )
    assert strict == pytest.approx([4.8769, 3.3569, 2.6803, 2.2898, 2.0310], abs=0.003)
    even = group_sequential.bounds(fractions, spending=group_sequential.pocock_spending, sides=1, alpha=0.025)
    assert even == pytest.approx([2.4380, 2.4268, 2.4101, 2.3966, 2.3859], abs=0.003)


def test_one_look_is_the_plain_test() -> None:
    found = group_sequential.bounds([1.0], spending=group_sequential.power_spending(1.0))
    assert found == pytest.approx([1.959964], abs=1e-5)


def test_sequential_p_is_above_the_fixed_one_and_its_interval_wider() -> None:
    found = effect(Arm.proportion(500, 10_000), Arm.proportion(570, 10_000))
    fixed, always = t_test(found), sequential.asymptotic_sequence(found)
    assert always.p_value > fixed.p_value
    assert always.ci[0] < fixed.ci[0]
    assert always.always_valid
    assert not fixed.always_valid


def test_sequential_interval_excludes_zero_exactly_when_p_is_below_alpha() -> None:
    for shift in np.linspace(0.0, 0.2, 41):
        result = sequential.asymptotic_sequence(effect(Arm(4000, 0.0, 1.0), Arm(4000, float(shift), 1.0)))
        assert (result.p_value < 0.05) == (result.ci[0] > 0)


def test_sample_ratio_sees_broken_assignment_and_ignores_noise() -> None:
    assert counts.sample_ratio([5050, 4950], [0.5, 0.5]).p_value > 0.1
    assert counts.sample_ratio([9200, 800], [9000, 1000]).p_value < counts.SAMPLE_RATIO_LEVEL
    assert counts.sample_ratio([10, 5], [1, 0]).p_value == 0.0
    _, running = sequential.sequential_sample_ratio(
        [[900, 1100], [1800, 2200]], [0.5, 0.5], concentration=100
    )
    assert running[1] < running[0] < 0.05


def test_bayesian_limits() -> None:
    found = effect(Arm.proportion(500, 10_000), Arm.proportion(500, 10_000))
    even = bayesian.posterior(found)
    assert even.chance_to_win == pytest.approx(0.5)
    assert even.risk_control == pytest.approx(even.risk_treatment)
    sure = bayesian.posterior(found, bayesian.NormalPrior(0.0, 1e-6, "absolute"))
    assert sure.sd < 1e-5
    assert bayesian.beta_chance_to_win((5, 50), (5, 50)) == pytest.approx(0.5, abs=1e-9)


def test_relative_prior_scales_with_the_control() -> None:
    control, treatment = Arm.proportion(500, 10_000), Arm.proportion(570, 10_000)
    prior = bayesian.NormalPrior(0.0, 0.1)
    absolute = bayesian.posterior(effect(control, treatment), prior)
    by_hand = bayesian.posterior(effect(control, treatment), bayesian.NormalPrior(0.0, 0.005, "absolute"))
    assert absolute.estimate == pytest.approx(by_hand.estimate)


def test_guardrails() -> None:
    found = effect(Arm.proportion(500, 10_000), Arm.proportion(505, 10_000))
    assert non_inferiority(found, -0.01).p_value < 0.001
    assert non_inferiority(found, 0.01, alternative="smaller").p_value < 0.01
    assert equivalence(found, -0.01, 0.01).p_value < 0.05
    assert equivalence(found, -0.001, 0.001).p_value > 0.3
    with pytest.raises(ValueError, match="low < high"):
        equivalence(found, 0.1, -0.1)


def test_planned_sizes() -> None:
    assert math.ceil(power.sample_size_two_proportions(0.05, 0.055)) == 31_234
    n = power.sample_size_two_proportions(0.05, 0.055, sides=1)
    assert power.power_two_proportions(n, 0.05, 0.055, sides=1) == pytest.approx(0.8, abs=1e-9)
    n = power.sample_size_mean(0.3, 1.0, power=0.9, samples=1)
    assert power.power_mean(n, 0.3, 1.0, samples=1) == pytest.approx(0.9, abs=1e-9)
    with pytest.raises(ValueError, match="effect of zero"):
        power.sample_size_two_proportions(0.1, 0.1)


def test_corrections_order_and_limit() -> None:
    raw = [0.001, 0.02, 0.03, 0.5]
    adjusted = {
        method: multiple.adjust(raw, method).p_values for method in ("bonferroni", "holm", "bh", "none")
    }
    assert np.all(adjusted["bonferroni"] >= adjusted["holm"])
    assert np.all(adjusted["holm"] >= adjusted["bh"])
    assert np.all(adjusted["bh"] >= adjusted["none"])


def test_logged_policy_evaluates_to_its_own_mean() -> None:
    rng = np.random.default_rng(6)
    shares = np.tile([0.7, 0.3], (500, 1))
    actions = (rng.random(500) > 0.7).astype(int)
    rewards = rng.random(500)
    found = policies.off_policy(actions, rewards, shares[np.arange(500), actions], shares)
    assert found.ips == pytest.approx(rewards.mean())
    assert found.effective_n == pytest.approx(500)
    assert math.isnan(found.dr)


def test_bandit_weights() -> None:
    draws = np.random.default_rng(7).normal([0.0, 5.0, 2.0], 0.1, (1000, 3))
    assert policies.top_two_weights(draws) == [0.0, 0.5, 0.5]
    assert policies.top_two_weights(draws[:, :2]) == [0.5, 0.5]
    assert policies.best_arm_chances(draws) == [0.0, 1.0, 0.0]
