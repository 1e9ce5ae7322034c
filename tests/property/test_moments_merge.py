"""Merging sufficient statistics in any split and order gives what one pass over everything gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.analytics.statistics.effects import Arm, effect
from services.analytics.statistics.fixed_horizon import z_test
from services.analytics.statistics.moments import Moments, PairedMoments
from services.analytics.statistics.proportions import two_proportion_z_test, wilson
from services.analytics.statistics.sequential import asymptotic_sequence

values = st.lists(st.floats(-1e6, 1e6), max_size=40)


@given(values, values, values)
def test_moments_merge_like_one_pass(a: list[float], b: list[float], c: list[float]) -> None:
    left = (Moments.of(a) + Moments.of(b)) + Moments.of(c)
    right = Moments.of(a) + (Moments.of(b) + Moments.of(c))
    whole = Moments.of(a + b + c)
    for merged in (left, right, Moments.of(c) + Moments.of(a) + Moments.of(b)):
        assert merged.n == whole.n
        assert merged.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-6)
        assert merged.m2 == pytest.approx(whole.m2, rel=1e-9, abs=1e-3)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), max_size=60), st.integers(0, 60))
def test_cross_products_merge_like_one_pass(pairs: list[tuple[float, float]], cut: int) -> None:
    table = np.array(pairs, dtype=float).reshape(-1, 2)
    whole = PairedMoments.of(table[:, 0], table[:, 1])
    merged = PairedMoments.of(*table[:cut].T) + PairedMoments.of(*table[cut:].T)
    assert merged.n == whole.n
    assert merged.cross == pytest.approx(whole.cross, rel=1e-9, abs=1e-5)
    assert merged.y.m2 == pytest.approx(whole.y.m2, rel=1e-9, abs=1e-5)


def test_a_large_offset_costs_no_precision() -> None:
    sample = np.random.default_rng(0).normal(0, 1, 10_000)
    parts = np.array_split(sample + 1e9, 100)
    merged = sum((Moments.of(part) for part in parts), Moments())
    assert merged.variance == pytest.approx(float(sample.var(ddof=1)), rel=1e-6)


shares = st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)).map(lambda pair: (min(pair), max(pair)))


@given(shares, shares)
def test_swapping_the_arms_mirrors_the_result(control: tuple[int, int], treatment: tuple[int, int]) -> None:
    forward, backward = two_proportion_z_test(control, treatment), two_proportion_z_test(treatment, control)
    assert forward.p_value == pytest.approx(backward.p_value)
    assert forward.estimate == pytest.approx(-backward.estimate)
    assert 0.0 <= forward.p_value <= 1.0
    assert forward.newcombe_ci[0] <= forward.estimate <= forward.newcombe_ci[1]


@given(shares, st.floats(0.001, 0.5))
def test_wilson_holds_the_estimate_within_zero_and_one(side: tuple[int, int], alpha: float) -> None:
    low, high = wilson(*side, alpha=alpha)
    assert 0.0 <= low <= side[0] / side[1] + 1e-12
    assert side[0] / side[1] - 1e-12 <= high <= 1.0


@given(
    st.integers(2, 100_000),
    st.integers(2, 100_000),
    st.floats(-100, 100),
    st.floats(1e-3, 100),
    st.floats(1e-3, 100),
)
def test_an_interval_valid_at_every_look_contains_the_fixed_one(
    n: int, m: int, gap: float, spread: float, other: float
) -> None:
    found = effect(Arm(n, 0.0, spread), Arm(m, gap, other))
    fixed, always = z_test(found), asymptotic_sequence(found)
    assert always.ci[0] < fixed.ci[0] <= fixed.ci[1] < always.ci[1]
    assert always.p_value >= fixed.p_value
