"""What results say of trials whose truth is known, and how they say it."""

import json
import math

import numpy as np
import pytest
from headrace.v1.trials_pb2 import Evidence, Trial, TrialMetric

from services.analytics.arm_results import Json, Options, Seen
from services.analytics.evidence import Observed
from services.analytics.lifts import lift, measured
from services.analytics.results import results
from services.analytics.statistics.stratified import Cells
from services.analytics.trial_queries import Counts
from services.analytics.verdicts import look_at, verdict
from services.analytics.words import paragraph
from tests.fixtures.trial_units import World, guardrails, observe, revenue, trial

NOW_US = 1_800_000_000_000_000


def shown(
    judged: Trial,
    observed: Observed,
    requests: tuple[int, int],
    options: Options | None = None,
    **more: object,
) -> Json:
    counts = [Counts(n, n, n // 50, n) for n in requests]
    look = look_at(judged, observed, counts, NOW_US)
    made = verdict(judged, look, {}, look.ratio_log_e, verdict_id=bytes(16), now_us=NOW_US)
    seen = Seen(judged, made, observed, counts, NOW_US, **more)  # type: ignore[arg-type] # named by the tests
    return results(seen, options or Options())


def experiment(metrics: list[TrialMetric], planned: int = 0) -> Trial:
    made = trial(metrics)
    made.kind, made.trial_id, made.planned_units = Trial.KIND_EXPERIMENT, "exp_1", planned
    made.started_at_us = NOW_US - 2 * 86_400_000_000
    return made


def comparison(found: Json, metric: str) -> Json:
    first: Json = next(one for one in found["metrics"] if one["metric"] == metric)["comparisons"][0]
    return first


EVEN = World(requests=6_000, users=0, weights=(0.5,), drift=1.0)


def test_every_number_of_a_share_and_a_mean() -> None:
    judged = experiment([*guardrails(0.05), revenue()], planned=10_000)
    observed = observe(judged, EVEN.simulate(np.random.default_rng(1)), 6_000)
    found = shown(judged, observed, (3_000, 3_000), latencies=observed.histograms["latency_ms:p99"])
    assert json.loads(json.dumps(found)) == found
    errors = comparison(found, "error_rate")
    fixed, always = errors["fixed_horizon"], errors["always_valid"]
    assert always["interval"][0] < fixed["interval"][0] < errors["estimate"] < fixed["interval"][1]
    assert always["interval"][1] > fixed["interval"][1]
    assert always["p_value"] == pytest.approx(min(1.0, 1 / always["e_value"]))
    assert fixed["relative_interval"][0] < errors["relative_lift"] < fixed["relative_interval"][1]
    assert errors["decision"]["finding"] in ("safe", "undecided")
    assert errors["margin_tests"]["non_inferiority_p_value"] < 0.001
    assert 0 < errors["holm_p_value"] < 0.01
    assert 0 < errors["bayesian"]["chance_to_be_better"] < 1
    assert errors["time_to_decision"]["units_per_arm_and_day"] == pytest.approx(1_500, rel=0.1)
    assert errors["time_to_decision"]["planned_days_left"] > 4
    bought = comparison(found, "revenue")
    assert bought["q_value"] == pytest.approx(bought["fixed_horizon"]["p_value"])
    assert bought["fixed_horizon"]["method"].startswith("Welch")
    slow = comparison(found, "latency_ms")["quantiles"]
    assert [one["quantile"] for one in slow] == [0.5, 0.95, 0.99]
    for one in slow:
        low, high = one["always_valid_interval"]
        assert low < one["difference"] < high
        assert low < one["fixed_horizon_interval"][0] < one["fixed_horizon_interval"][1] < high
    (tail,) = comparison(found, "latency_ms:p99")["quantiles"]
    assert tail == slow[2]
    assert "before the planned 10000 units" in " ".join(found["warnings"])
    assert found["sample_ratio"]["fixed_p_value"] > 0.001
    assert found["summary"].startswith("exp_1: 2 (3,000 units) against 1 (3,000 units). It is still running.")


def test_a_better_arm_is_said_to_be_better_by_results_and_verdict_alike() -> None:
    world = World(requests=20_000, users=0, weights=(0.5,), errors=0.3, treated_errors=0.1, drift=1.0)
    judged = experiment(guardrails(0.05)[:1])
    observed = observe(judged, world.simulate(np.random.default_rng(2)), 20_000)
    found = shown(judged, observed, (10_000, 10_000), Options("pocock", 4))
    one = comparison(found, "error_rate")
    assert one["decision"]["finding"] == "better"
    assert one["always_valid"]["interval"][1] < 0
    assert one["bayesian"]["chance_to_be_better"] > 0.999
    assert one["bayesian"]["risk_of_taking_it"] < 1e-6
    assert one["group_sequential"]["note"].startswith("Bounds for planned looks need")
    assert "Error rate of 2 differs by" in found["summary"]
    assert "proven to be better" in found["summary"]


def test_planned_looks() -> None:
    judged = experiment([revenue()], planned=4_000)
    observed = observe(judged, EVEN.simulate(np.random.default_rng(3)), 6_000)
    planned = comparison(shown(judged, observed, (3_000, 3_000), Options("obrien_fleming", 4)), "revenue")
    looks = planned["group_sequential"]
    assert [look["information"] for look in looks["looks"]] == [0.25, 0.5, 0.75, 1.0]
    bounds = [look["z_bound"] for look in looks["looks"]]
    assert bounds == sorted(bounds, reverse=True)
    assert looks["look"] == 2
    assert looks["crossed"] == (abs(looks["z"]) >= bounds[1])


def test_before_anything_came_it_says_so() -> None:
    judged = experiment([*guardrails(), revenue()])
    observed = observe(judged, EVEN.simulate(np.random.default_rng(4)), 0)
    found = shown(judged, observed, (0, 0))
    assert "nothing to say" in found["summary"]
    assert all(
        one["decision"]["finding"] == "undecided" for m in found["metrics"] for one in m["comparisons"]
    )


def test_changed_weights_are_compared_within_themselves() -> None:
    """Errors grow with time as the canary does: pooled, the canary would look worse."""
    world = World(requests=30_000, users=0, weights=(0.1, 0.5), errors=0.05, drift=4.0)
    judged = experiment(guardrails()[:1])
    found = shown(judged, observe(judged, world.simulate(np.random.default_rng(5)), 30_000), (20_000, 10_000))
    one = comparison(found, "error_rate")
    arms = {arm["arm"]: arm["mean"] for arm in found["metrics"][0]["arms"]}
    assert arms["2"] - arms["1"] > 0.01
    low, high = one["fixed_horizon"]["interval"]
    assert low < 0 < high
    assert "within 2 strata" in one["fixed_horizon"]["method"]
    assert "The weights have changed" in " ".join(found["warnings"])


def test_a_covariate_narrows_the_interval_and_stands_beside_the_plain_one() -> None:
    rng = np.random.default_rng(6)
    n = 4_000
    before = rng.gamma(2.0, 3.0, n)
    arms = np.repeat([0, 1], n // 2)
    values = 0.8 * before + rng.normal(1.0, 2.0, n) + 0.15 * arms
    cells = Cells(np.arange(n).astype(np.uint64), arms, np.zeros(n, np.int64), values, np.ones(n), before)
    metric = TrialMetric(
        name="revenue",
        role=TrialMetric.ROLE_SUCCESS,
        direction=TrialMetric.DIRECTION_INCREASE,
        covariate=TrialMetric.COVARIATE_PRE_PERIOD,
        pre_period_s=86_400,
    )
    judged = experiment([metric])
    empty = observe(experiment([]), EVEN.simulate(rng), 100)
    found = shown(judged, Observed(empty.strata, empty.visits, {"revenue": cells}), (2_000, 2_000))
    one = comparison(found, "revenue")
    assert one["variance_reduction"] == pytest.approx(0.74, abs=0.04)
    assert one["std_error"] < 0.6 * one["unadjusted"]["std_error"]
    assert one["fixed_horizon"]["interval"][0] > one["unadjusted"]["fixed_horizon"]["interval"][0]


def test_missing_outcomes_and_few_units_are_told() -> None:
    rng = np.random.default_rng(7)
    judged = experiment(
        [TrialMetric(name="rating", role=TrialMetric.ROLE_SUCCESS, direction=TrialMetric.DIRECTION_INCREASE)]
    )
    empty = observe(experiment([]), EVEN.simulate(rng), 6_000)
    sizes = (2_500, 90)
    arms = np.repeat([0, 1], sizes)
    n = sum(sizes)
    cells = Cells(
        np.arange(n).astype(np.uint64), arms, np.zeros(n, np.int64), rng.normal(3, 1, n), np.ones(n)
    )
    found = shown(judged, Observed(empty.strata, empty.visits, {"rating": cells}), (3_000, 3_000))
    told = " ".join(found["warnings"])
    assert "fewer than 100 units have a value in 2" in told
    assert "units lack a value more often in one arm" in told


def test_harm_is_said_first_and_clearly() -> None:
    world = World(requests=4_000, users=0, weights=(0.5,), errors=0.01, treated_errors=0.3, drift=1.0)
    judged = experiment(guardrails(0.01)[:1])
    found = shown(judged, observe(judged, world.simulate(np.random.default_rng(8)), 4_000), (2_000, 2_000))
    assert found["metrics"][0]["comparisons"][0]["decision"]["finding"] == "harmful"
    assert found["summary"].endswith("Stop it.")
    assert Evidence.Finding.Name(Evidence.FINDING_HARMFUL) == "FINDING_HARMFUL"


def cells_of(control: np.ndarray, treatment: np.ndarray) -> Cells:
    n = control.size + treatment.size
    arms = np.repeat([0, 1], [control.size, treatment.size])
    values = np.concatenate((control, treatment)).astype(float)
    return Cells(np.arange(n).astype(np.uint64), arms, np.zeros(n, np.int64), values, np.ones(n))


def test_nothing_crashes_where_there_is_nothing() -> None:
    for control, treatment in (
        (np.zeros(5), np.zeros(5)),
        (np.ones(5), np.zeros(5)),
        (np.zeros(1), np.ones(1)),
        (np.full(4, 2.5), np.full(4, 2.5)),
        (np.zeros(0), np.ones(3)),
    ):
        cells = cells_of(control, treatment)
        found = lift(cells, alpha=0.05, tuning=1000)
        assert measured(cells, 0, alpha=0.05).units == control.size
        if found is not None and found.fixed.p_value is not None:
            assert 0 <= found.fixed.p_value <= 1
        if found is not None:
            assert found.sequence.p_value == 1


def test_a_relative_interval_needs_a_control_that_is_not_about_zero() -> None:
    rng = np.random.default_rng(9)
    found = lift(cells_of(rng.normal(0.01, 1, 50), rng.normal(0.2, 1, 50)), alpha=0.05, tuning=1000)
    assert found is not None
    assert found.fixed.relative_interval is None
    assert found.fixed.interval is not None
    assert all(math.isfinite(limit) for limit in found.fixed.interval)


def test_a_gain_is_no_reason_to_end_while_a_guardrail_is_open() -> None:
    judged = experiment([*guardrails(0.05)[:1], revenue()])
    observed = observe(judged, EVEN.simulate(np.random.default_rng(1)), 6_000)
    found = shown(judged, observed, (3_000, 3_000))
    comparison(found, "revenue")["decision"]["finding"] = "better"
    comparison(found, "error_rate")["decision"]["finding"] = "undecided"
    assert paragraph(found).endswith("that no guardrail suffers is not proven yet.")
    comparison(found, "error_rate")["decision"]["finding"] = "safe"
    assert paragraph(found).endswith("the result will hold.")
