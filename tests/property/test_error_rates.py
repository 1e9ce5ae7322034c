"""The promises of the tests, by simulation: coverage, power at the planned size, false positives at any look.

Seeds are fixed, so a failure is a change of the code, not bad luck.
"""

from collections.abc import Callable

import numpy as np
import pytest

from services.analytics.statistics.effects import Arm, Effect, cuped, effect
from services.analytics.statistics.fixed_horizon import t_test
from services.analytics.statistics.moments import Moments, PairedMoments
from services.analytics.statistics.power import sample_size_mean, sample_size_two_proportions
from services.analytics.statistics.proportions import two_proportion_z_test, wilson
from services.analytics.statistics.sequential import (
    asymptotic_sequence,
    msprt_p_values,
    sequential_sample_ratio,
)

RUNS = 4000

Experiment = Callable[[np.random.Generator], Effect]


def proportions(rng: np.random.Generator) -> Effect:
    return effect(Arm.proportion(rng.binomial(900, 0.10), 900), Arm.proportion(rng.binomial(700, 0.13), 700))


def skewed_means(rng: np.random.Generator) -> Effect:
    control, treatment = (Arm.from_moments(Moments.of(rng.gamma(2.0, s, 300))) for s in (1.0, 1.015))
    return effect(control, treatment)


def ratios(rng: np.random.Generator) -> Effect:
    """Users differ in their own rate, so requests of one user are alike."""
    arms = []
    for rate in (0.10, 0.13):
        visits = rng.poisson(4.0, 400) + 1
        own = rng.beta(rate * 20, (1 - rate) * 20, 400)
        arms.append(Arm.ratio(PairedMoments.of(rng.binomial(visits, own), visits)))
    return effect(arms[0], arms[1])


def adjusted(rng: np.random.Generator) -> Effect:
    sides = []
    for gain in (0.0, 0.03):
        before = rng.normal(5, 2, 300)
        sides.append(PairedMoments.of(0.7 * before + rng.normal(1 + gain, 1, 300), before))
    return cuped(sides[0], sides[1]).adjusted


@pytest.mark.parametrize(
    ("experiment", "truth"), [(proportions, 0.03), (skewed_means, 0.03), (ratios, 0.03), (adjusted, 0.03)]
)
def test_intervals_cover_the_truth_as_often_as_they_say(experiment: Experiment, truth: float) -> None:
    rng = np.random.default_rng(7)
    intervals = [t_test(experiment(rng)).ci for _ in range(RUNS)]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.01)


def test_wilson_covers_a_rare_share() -> None:
    rng = np.random.default_rng(8)
    intervals = [wilson(int(successes), 150) for successes in rng.binomial(150, 0.03, RUNS)]
    assert np.mean([low <= 0.03 <= high for low, high in intervals]) >= 0.94


def test_the_planned_size_has_the_planned_power() -> None:
    rng = np.random.default_rng(9)
    n = round(sample_size_two_proportions(0.10, 0.14, power=0.8))
    found = [
        two_proportion_z_test((int(a), n), (int(b), n)).p_value < 0.05
        for a, b in zip(rng.binomial(n, 0.10, RUNS), rng.binomial(n, 0.14, RUNS), strict=True)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.02)
    n = round(sample_size_mean(0.5, 1.0, power=0.9))
    draws = rng.normal(0, 1, (RUNS, 2, n))
    draws[:, 1] += 0.5
    found = [
        t_test(effect(Arm.from_moments(Moments.of(a)), Arm.from_moments(Moments.of(b)))).p_value < 0.05
        for a, b in draws
    ]
    assert np.mean(found) == pytest.approx(0.9, abs=0.02)


def looks(rng: np.random.Generator, shares: tuple[float, float]) -> list[Effect]:
    """Twenty looks at two growing shares, 200 units an arm between them."""
    a, b = (np.cumsum(rng.binomial(200, share, 20)) for share in shares)
    sizes = np.arange(200, 4001, 200)
    return [
        effect(Arm.proportion(int(x), int(n)), Arm.proportion(int(y), int(n)))
        for x, y, n in zip(a, b, sizes, strict=True)
    ]


def test_always_valid_intervals_hold_at_all_twenty_looks_together_and_find_what_is_there() -> None:
    rng = np.random.default_rng(10)
    wrong = naive = found = 0
    for _ in range(800):
        same = looks(rng, (0.05, 0.05))
        wrong += any(asymptotic_sequence(one).p_value < 0.05 for one in same)
        naive += any(t_test(one).p_value < 0.05 for one in same)
        found += any(asymptotic_sequence(one).p_value < 0.05 for one in looks(rng, (0.05, 0.08)))
    assert wrong / 800 <= 0.05
    assert naive / 800 > 0.18
    assert found / 800 > 0.9


def test_msprt_and_the_sequential_sample_ratio_hold_at_every_look() -> None:
    rng = np.random.default_rng(11)
    walks = np.cumsum(rng.normal(0, 1, (800, 1000)), axis=1)
    times = np.arange(20, 1000, 20)
    _, p_values = msprt_p_values(walks[:, times].ravel(), np.tile(times + 1.0, 800), rho=50.0)
    assert np.mean(p_values.reshape(800, -1).min(axis=1) < 0.05) <= 0.05
    wrong = broken = 0
    for _ in range(400):
        counts = np.cumsum(rng.multinomial(500, [0.5, 0.5], 20), axis=0)
        wrong += bool(sequential_sample_ratio(counts.tolist(), [0.5, 0.5])[1][-1] < 0.05)
        counts = np.cumsum(rng.multinomial(500, [0.53, 0.47], 20), axis=0)
        broken += bool(sequential_sample_ratio(counts.tolist(), [0.5, 0.5])[1][-1] < 0.05)
    assert wrong / 400 <= 0.05
    assert broken / 400 > 0.9
