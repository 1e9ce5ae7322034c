"""Which test a comparison picks, and what it warns of."""

import numpy as np
import pytest

from services.analytics.arm_queries import Arms, Observations
from services.analytics.comparison import compare, sample_ratio
from services.analytics.schemas import comparison_json, sentence
from services.analytics.statistics.proportions import two_proportion_z_test


def observed(
    values: list[float] | np.ndarray, counts: list[float] | np.ndarray | None = None, share: float = 0.5
) -> Observations:
    totals = np.asarray(values, dtype=float)
    sizes = np.ones(totals.size) if counts is None else np.asarray(counts, dtype=float)
    return Observations(
        units=np.arange(totals.size, dtype=np.uint64),
        totals=totals,
        counts=sizes,
        revisions=np.full(totals.size, 3, dtype=np.uint64),
        propensities=np.full(totals.size, share),
        binary=bool(np.all(np.isin(totals, (0, 1)))) if counts is None else True,
    )


def test_users_without_an_outcome_count_as_zero_or_not_at_all() -> None:
    """50 of 200 bought for 10 in one arm, 100 of 200 in the other, some of them twice."""
    a = observed(np.repeat([10.0, 0.0], [50, 150]), np.repeat([1, 0], [50, 150]))
    b = observed(np.repeat([20.0, 10.0, 0.0], [20, 80, 100]), np.repeat([2, 1, 0], [20, 80, 100]))
    zero = compare(Arms(a, b, 0), "revenue", ("1", "2"), missing="zero")
    assert (zero.a.mean, zero.b.mean) == (2.5, 6.0)
    assert (zero.a.exposed, zero.a.units, zero.a.observations, zero.a.measured) == (200, 200, 50, 0.25)
    assert zero.fixed is not None
    assert zero.fixed.method == "Welch's t-test"
    assert "missing=zero" in " ".join(zero.assumptions)
    exclude = compare(Arms(a, b, 0), "revenue", ("1", "2"), missing="exclude")
    assert (exclude.a.mean, exclude.b.mean) == (10.0, 10.0)
    assert (exclude.b.exposed, exclude.b.units, exclude.b.observations) == (200, 100, 120)
    assert "lacks values more often" in " ".join(exclude.warnings)
    assert exclude.sample_ratio == zero.sample_ratio


def test_without_a_split_nothing_is_called_an_effect() -> None:
    arms = Arms(observed(ones(5, 100)), observed(ones(9, 900)), 0, randomised=False)
    found = compare(arms, "error_rate", ("1", "2"))
    assert found.sample_ratio is None
    assert "No split sent users to both versions by chance" in " ".join(found.warnings)


def test_labels_that_were_left_out_are_told() -> None:
    arms = Arms(observed(ones(5, 100)), observed(ones(9, 100)), 0, unmapped=7)
    assert any(
        warning.startswith("7 labels are left out") for warning in compare(arms, "m", ("1", "2")).warnings
    )


def test_what_an_experiment_took_is_told() -> None:
    nobody = Arms(observed([]), observed([]), 0, randomised=False, experiments=[("exp_b", 1234)])
    told = compare(nobody, "accuracy", ("1", "2")).warnings
    assert any("1,234 of exp_b" in warning and "/results" in warning for warning in told)


def ones(successes: int, n: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [successes, n - successes])


def test_shares_of_single_observations_get_the_two_proportion_test() -> None:
    found = compare(Arms(observed(ones(50, 1000)), observed(ones(80, 1000)), 0), "error_rate", ("1", "2"))
    expected = two_proportion_z_test((50, 1000), (80, 1000))
    assert found.fixed is not None
    assert found.fixed.method.startswith("two-proportion z-test")
    assert found.fixed.p_value == pytest.approx(expected.p_value)
    assert found.fixed.ci == pytest.approx(expected.wald_ci)
    assert found.relative is not None
    assert found.relative.estimate == pytest.approx(0.6)
    assert found.a.ci is not None
    assert found.a.ci[0] < 0.05 < found.a.ci[1]


def test_means_get_welch() -> None:
    rng = np.random.default_rng(1)
    arms = Arms(observed(rng.normal(20, 5, 400)), observed(rng.normal(22, 9, 300)), 0)
    found = compare(arms, "latency_ms", ("1", "2"))
    assert found.fixed is not None
    assert found.fixed.method == "Welch's t-test"
    assert found.sequential is not None
    assert found.sequential.always_valid
    assert found.sequential.p_value > found.fixed.p_value


def test_several_observations_a_unit_widen_the_interval() -> None:
    """Ten identical observations of 200 users are 200 observations, not 2,000."""
    wins = ones(40, 200)
    clustered = compare(
        Arms(observed(wins * 10, np.full(200, 10)), observed(wins * 10, np.full(200, 10)), 0),
        "ok",
        ("1", "2"),
    )
    single = compare(Arms(observed(wins), observed(wins), 0), "ok", ("1", "2"))
    assert clustered.fixed is not None
    assert single.fixed is not None
    assert "delta method" in clustered.fixed.method
    assert clustered.fixed.std_error == pytest.approx(single.fixed.std_error, rel=0.01)
    assert clustered.a.observations == 2000
    assert clustered.a.units == 200


def test_too_little_data_says_so_instead_of_testing() -> None:
    found = compare(Arms(observed(ones(1, 1)), observed([]), 0), "error_rate", ("1", "2"))
    assert found.fixed is None
    assert found.sequential is None
    assert any("fewer than two units" in warning for warning in found.warnings)
    assert "too little data" in sentence("error_rate", found)
    assert comparison_json("m", "error_rate", found)["absolute"] is None


def test_a_broken_split_is_warned_of_and_a_right_one_is_not() -> None:
    broken = Arms(observed(ones(5, 9000), share=0.8), observed(ones(5, 1000), share=0.2), 4)
    warnings = " ".join(compare(broken, "error_rate", ("1", "2")).warnings)
    assert "Sample ratio mismatch" in warnings
    assert "4 units met both" in warnings
    assert "fewer than 10 events" in warnings
    right = Arms(observed(ones(50, 8000), share=0.8), observed(ones(50, 2000), share=0.2), 0)
    assert "mismatch" not in " ".join(compare(right, "error_rate", ("1", "2")).warnings)


def test_a_split_that_changed_between_revisions_is_no_mismatch() -> None:
    a, b = observed(ones(5, 9500), share=0.9), observed(ones(5, 5500), share=0.1)
    a.revisions[9000:], b.revisions[1000:] = 4, 4
    a.propensities[9000:], b.propensities[1000:] = 0.1, 0.9
    found = sample_ratio(Arms(a, b, 0))
    assert found is not None
    assert found.p_value > 0.01


def test_without_propensities_the_split_is_not_judged() -> None:
    arms = Arms(observed(ones(5, 100), share=0.0), observed(ones(5, 100), share=0.0), 0)
    assert sample_ratio(arms) is None
    assert any("not checked" in warning for warning in compare(arms, "error_rate", ("1", "2")).warnings)


def test_arms_without_any_event_do_not_divide_by_zero() -> None:
    found = compare(Arms(observed(ones(0, 500)), observed(ones(0, 500)), 0), "error_rate", ("1", "2"))
    assert found.fixed is not None
    assert found.fixed.p_value == 1.0
    low, high = found.fixed.ci
    assert low < -0.005 < 0.005 < high
    assert found.sequential is None
    assert found.relative is None
    assert "No value differs" in " ".join(found.warnings)
    assert "no difference is shown" in sentence("error_rate", found)


def test_means_without_any_spread_have_no_p_value() -> None:
    arms = Arms(observed(np.full(200, 3.0)), observed(np.full(200, 4.0)), 0)
    found = compare(arms, "latency_ms", ("1", "2"))
    assert (found.fixed, found.sequential, found.relative) == (None, None, None)
    assert "No value differs" in " ".join(found.warnings)


def test_small_arms_have_no_sequential_result() -> None:
    found = compare(Arms(observed(ones(1, 20)), observed(ones(9, 20)), 0), "error_rate", ("1", "2"))
    assert found.fixed is not None
    assert found.sequential is None
    assert "no difference is shown" in sentence("error_rate", found)
