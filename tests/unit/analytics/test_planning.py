"""Sizes of experiments, before they start."""

import numpy as np
import pytest
from headrace.v1.trials_pb2 import Trial, TrialArm, TrialMetric
from pydantic import ValidationError

from services.analytics.evidence import statement_alpha
from services.analytics.experiment_schemas import PlanIn
from services.analytics.planning import Question, plan, sequential_cost
from services.analytics.statistics.boundaries import normal_mixture
from services.common.errors import InvalidArgument


def test_five_percent_and_a_tenth_more_need_31_234_users_each() -> None:
    found = plan(PlanIn(baseline=0.05, relative_effect=0.1, units_per_day=5_000).question())
    assert found["units_per_variant"] == 31_234
    assert found["total_units"] == 62_468
    assert found["days"] == pytest.approx(12.49, abs=0.01)
    always = found["always_valid"]
    assert 31_234 * 1.4 < always["at_most"]["units_per_variant"] < 31_234 * 1.9
    assert "31,234 units in each variant" in found["summary"]


def test_planned_looks_cost_what_the_textbook_says() -> None:
    """Inflation factors for five looks at 80% power (Jennison & Turnbull 2000, tables 2.2 and 2.4 for the
    classical bounds; spending functions come close to them)."""
    found = plan(PlanIn(baseline=0.05, relative_effect=0.1).question())["planned_looks"]
    assert found["obrien_fleming"]["factor"] == pytest.approx(1.028, abs=0.015)
    assert found["pocock"]["factor"] == pytest.approx(1.229, abs=0.03)
    assert found["obrien_fleming"]["units_per_variant"] < found["pocock"]["units_per_variant"]
    once = plan(PlanIn(baseline=0.05, relative_effect=0.1, looks=1).question())["planned_looks"]
    assert once["pocock"]["factor"] == pytest.approx(1, abs=0.02)


def test_given_units_say_what_they_find() -> None:
    found = plan(PlanIn(baseline=0.05, units_per_variant=31_234).question())
    assert found["detectable"]["rise"] == pytest.approx(0.005, rel=1e-4)
    assert found["detectable"]["relative_fall"] > -0.1
    assert found["always_valid"]["detectable"]["rise"] > 0.006


def test_means_arms_of_unequal_size_and_several_variants() -> None:
    even = plan(PlanIn(metric="mean", mean=20, sd=10, effect=1, sequential=False).question())
    assert even["units_per_variant"] == 1_571  # power.t.test(delta = 1, sd = 10, power = 0.8)
    assert "always_valid" not in even
    uneven = plan(PlanIn(metric="mean", mean=20, sd=10, effect=1, ratio=0.25).question())
    assert uneven["units_per_variant"] is None
    assert uneven["total_units"] > even["total_units"] * 1.5
    several = plan(PlanIn(metric="mean", mean=20, sd=10, effect=1, variants=3).question())
    assert several["alpha_per_comparison"] == 0.025
    assert several["units_per_variant"] > even["units_per_variant"]


def test_metrics_share_alpha_as_they_do_when_it_is_decided() -> None:
    """Of an experiment with two metrics, each statement is decided at half of alpha."""
    trial = Trial(alpha=0.05, arms=[TrialArm(name=name) for name in "abc"])
    trial.metrics.extend(TrialMetric(name=name) for name in ("revenue", "error_rate"))
    alone, shared = (
        plan(PlanIn(baseline=0.05, relative_effect=0.1, variants=3, metrics=count).question())
        for count in (1, 2)
    )
    assert shared["alpha_per_statement"] == statement_alpha(trial) == shared["always_valid"]["alpha"]
    assert shared["units_per_variant"] == alone["units_per_variant"]
    most, least = (found["always_valid"]["at_most"]["units_per_variant"] for found in (shared, alone))
    halved = plan(PlanIn(baseline=0.05, relative_effect=0.1, variants=3, alpha=0.025).question())
    assert most == halved["always_valid"]["at_most"]["units_per_variant"] > least
    assert shared["always_valid"]["factor_at_most"] == pytest.approx(
        most / alone["units_per_variant"], abs=0.01
    )
    assert "alpha 0.0125, one of 4 equal shares" in shared["summary"]
    given = plan(PlanIn(baseline=0.05, units_per_variant=31_234, metrics=3).question())["always_valid"]
    assert given["alpha"] == pytest.approx(0.05 / 3)
    usual = plan(PlanIn(baseline=0.05, units_per_variant=31_234).question())["always_valid"]
    assert given["detectable"]["rise"] > usual["detectable"]["rise"]


def test_rare_events_are_told() -> None:
    assert plan(Question("proportion", 0.001, 0.2))["warnings"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"baseline": 0.05}, "effect"),
        ({"baseline": 0.05, "effect": 0.01, "relative_effect": 0.2}, "relative_effect"),
        ({"baseline": 0.05, "effect": 0}, "effect"),
        ({"baseline": 0.95, "effect": 0.1}, "effect"),
        ({"baseline": 0.95, "relative_effect": 0.1}, "relative_effect"),
        ({"baseline": 1.5, "effect": 0.1}, "baseline"),
        ({"effect": 0.1}, "baseline"),
        ({"baseline": 0.1, "sd": 2, "effect": 0.1}, "sd"),
        ({"metric": "mean", "mean": 1, "effect": 0.1}, "sd"),
        ({"metric": "mean", "mean": 0, "sd": 1, "relative_effect": 0.1}, "relative_effect"),
        ({"metric": "mean", "baseline": 1, "mean": 1, "sd": 1, "effect": 1}, "baseline"),
        ({"baseline": 0.1, "effect": 0.1, "units_per_variant": 10}, "units_per_variant"),
        ({"baseline": 0.1, "effect": 1e-20}, "effect"),
        ({"baseline": 1e-320, "effect": 0.5}, "baseline"),
        ({"metric": "mean", "mean": 1, "sd": 1, "effect": 1e-300}, "effect"),
        ({"metric": "mean", "mean": 1, "sd": 1, "effect": 1e200}, "effect"),
        ({"metric": "mean", "mean": 1e-320, "sd": 1, "effect": 1}, "mean"),
        ({"metric": "mean", "sd": 1, "units_per_variant": 2, "ratio": 0.001}, "units_per_variant"),
    ],
)
def test_what_does_not_fit_is_named(body: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        PlanIn.model_validate(body).question()
    assert refused.value.field == field


@pytest.mark.parametrize(
    "body",
    [
        {"baseline": 0.1, "effect": 0.1, name: value}
        for name, value in [
            ("alpha", 0),
            ("alpha", 1e-300),
            ("power", 1),
            ("variants", 1),
            ("units_per_day", 1e-320),
        ]
    ]
    + [{"metric": "mean", "mean": 1, "sd": sd, "effect": 1} for sd in (1e-300, 1e300)]
    + [{"baseline": "nan", "effect": 0.1}, {"baseline": 0.1, "effect": 0.1, "colour": "red"}],
)
def test_values_out_of_range_are_refused(body: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PlanIn.model_validate(body)


def test_the_size_for_looking_all_the_time_has_the_power_it_says() -> None:
    """On walks of another seed and finer looks than those that it was computed from."""
    cost = sequential_cost(0.05, 0.8)
    rng = np.random.default_rng(99)
    times = np.linspace(0.005, cost.at_most, 400)
    steps = rng.standard_normal((4_000, times.size)) * np.sqrt(np.diff(times, prepend=0.0))
    bound = np.array([normal_mixture(t, 0.025, v_opt=1.0, one_sided=True) for t in times])
    found = np.any(np.cumsum(steps, axis=1) + 2.8016 * times >= bound, axis=1)
    assert found.mean() == pytest.approx(0.8, abs=0.02)
