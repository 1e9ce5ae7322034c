"""Bets against shares: worth at most 1 on average under the null hypothesis, quick where it does not hold."""

import itertools
import math

import numpy as np
import pytest

from services.analytics.statistics import bets
from services.analytics.statistics.bets import RandomisedCounts, Side


def counts(r: float, n_a: float, k_a: float, n_b: float, k_b: float) -> RandomisedCounts:
    return RandomisedCounts(*(np.array([float(value)]) for value in (r, n_a, k_a, n_b, k_b)))


@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize(
    ("p_a", "p_b", "bound", "relative"),
    [
        (0.3, 0.3, 0.0, False),
        (0.2, 0.3, 0.1, False),
        (0.2, 0.3, 0.5, True),
        (0.6, 0.3, -0.3, False),
        (0.0, 0.1, 0.1, False),
    ],
)
def test_a_bet_on_randomised_units_is_fair_at_the_bound(
    side: Side, p_a: float, p_b: float, bound: float, relative: bool
) -> None:
    """By going through everything that five units can do, in two strata of different chances."""
    worth = 0.0
    shares = (0.1, 0.1, 0.5, 0.5, 0.5)
    for arms in itertools.product((0, 1), repeat=5):
        for events in itertools.product((0, 1), repeat=5):
            chance = 1.0
            tally = np.zeros((2, 2, 2))  # stratum, arm, units and events
            for r, arm, event in zip(shares, arms, events, strict=True):
                p = p_b if arm else p_a
                chance *= (r if arm else 1 - r) * (p if event else 1 - p)
                tally[int(r == 0.5), arm] += (1, event)
            held = RandomisedCounts(
                np.array([0.1, 0.5]), tally[:, 0, 0], tally[:, 0, 1], tally[:, 1, 0], tally[:, 1, 1]
            )
            worth += chance * math.exp(float(bets.randomised_share(held, bound, side, relative=relative)))
    assert worth == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("side", ["above", "below"])
def test_bets_on_shares_are_worth_no_more_than_they_cost(side: Side) -> None:
    n, p = 8, 0.3
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    alone = sum(chance * math.exp(bets.share(k, n, p, side)) for k, chance in enumerate(chances))
    assert alone == pytest.approx(1.0, abs=1e-9)
    paired = sum(
        first * second * math.exp(bets.two_shares((i, n), (j, n), 0.0, side, relative=False))
        for i, first in enumerate(chances)
        for j, second in enumerate(chances)
    )
    assert paired <= 1.0


def test_the_order_and_the_looks_do_not_matter_but_the_counts_do() -> None:
    broken = float(bets.randomised_share(counts(0.1, 54, 0, 6, 6), 0.01, "above"))
    assert broken > math.log(80)
    assert float(bets.randomised_share(counts(0.1, 540, 5, 60, 1), 0.01, "above")) < 1
    stacked = RandomisedCounts(
        np.array([0.1]),
        np.array([[54.0], [540.0]]),
        np.array([[0.0], [5.0]]),
        np.array([[6.0], [60.0]]),
        np.array([[6.0], [1.0]]),
    )
    assert bets.randomised_share(stacked, 0.01, "above")[0] == pytest.approx(broken)


def test_nothing_failing_for_long_is_safe_but_not_better() -> None:
    quiet = counts(0.5, 1_500, 0, 1_500, 0)
    assert float(bets.randomised_share(quiet, 0.01, "below")) > math.log(80)
    assert float(bets.randomised_share(quiet, 0.0, "below")) <= 0.0


def limits(held: RandomisedCounts) -> tuple[float, float]:
    def above(bound: float) -> float:
        return float(bets.randomised_share(held, bound, "above"))

    def below(bound: float) -> float:
        return float(bets.randomised_share(held, bound, "below"))

    return (
        bets.confidence_limit(above, "above", 0.025, -1.0, 1.0),
        bets.confidence_limit(below, "below", 0.025, -1.0, 1.0),
    )


def test_limits_lie_around_the_difference_and_narrow_with_units() -> None:
    widths = []
    for times in (1, 10):
        held = counts(0.5, 500 * times, 5 * times, 500 * times, 25 * times)
        low, high = limits(held)
        assert low < 0.04 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert bets.confidence_limit(lambda _bound: -1.0, "above", 0.05, -1.0, 1.0) == -1.0
    assert bets.confidence_limit(lambda _bound: -1.0, "below", 0.05, -1.0, 1.0) == 1.0


def test_unrandomised_shares_need_more_but_see_a_broken_version() -> None:
    assert bets.two_shares((10, 1_000), (50, 60), 0.01, "above", relative=False) > math.log(800)
    assert bets.two_shares((10, 1_000), (1, 60), 0.01, "above", relative=False) < 1
    assert bets.two_shares((100, 10_000), (80, 2_000), 0.5, "above", relative=True) > math.log(80)
    assert bets.two_shares((10, 1_000), (0, 3_000), 0.01, "below", relative=False) > math.log(80)
