"""One arm of a trial beside the control: every number, and none of them decides. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from headrace.v1.trials_pb2 import Evidence, Trial, TrialMetric, Verdict

from services.analytics import lifts, novelty
from services.analytics.evidence import Observed
from services.analytics.lifts import Lift, Measured
from services.analytics.novelty import Tenure
from services.analytics.quantile_lifts import Histograms
from services.analytics.statistics import bayesian, group_sequential
from services.analytics.statistics.stratified import Cells, stratified_effect
from services.analytics.trial_queries import Counts
from services.analytics.trial_strata import BEFORE

Json = dict[str, Any]
Bounds = Literal["obrien_fleming", "pocock"]

_SPENDING = {
    "obrien_fleming": group_sequential.obrien_fleming_spending,
    "pocock": group_sequential.pocock_spending,
}
_TUNING_UNITS = 5000.0
_DAY_US = 86_400_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """`bounds` with `looks` evenly spaced ones asks for group-sequential bounds, too."""

    bounds: Bounds | None = None
    looks: int = 5


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything that results are made of. `latencies` are histograms of latency_ms where a metric is about
    it; `placebo` is what the A/A arm of the model has shown; `tenures` are by metric name what units did at
    first and later."""

    trial: Trial
    verdict: Verdict
    observed: Observed
    counts: Sequence[Counts]
    now_us: int
    latencies: Histograms = field(default_factory=dict)
    placebo: Json | None = None
    tenures: Mapping[str, Tenure] = field(default_factory=dict)


def compared(seen: Seen, metric: TrialMetric, cells: Cells, place: int, options: Options) -> Json:
    """One arm against the control, on units that chance divided."""
    trial, rises = seen.trial, larger_is_better(metric)
    chosen = cells.where((cells.strata < BEFORE) & ((cells.arms == 0) | (cells.arms == place)))
    tuning = 2.0 * trial.planned_units or _TUNING_UNITS
    found = lifts.lift(chosen, alpha=trial.alpha, tuning=tuning)
    if found is None:
        return {}
    bare = lifts.unadjusted(chosen)
    sides = [lifts.measured(bare, arm, alpha=trial.alpha) for arm in (0, place)]
    shown = _lift_json(found)
    if chosen.covariate is not None:
        plain = lifts.lift(bare, alpha=trial.alpha, tuning=tuning)
        if plain is not None:
            shown["unadjusted"] = _lift_json(plain)
            reduction = 1 - (found.std_error / plain.std_error) ** 2 if plain.std_error > 0 else 0.0
            shown["variance_reduction"] = reduction
    margin = lifts.guarded(found, metric.margin, relative=metric.margin_is_relative, larger_is_better=rises)
    shown["margin_tests"] = margin and {
        "margin": margin.margin,
        "relative": margin.relative,
        "non_inferiority_p_value": margin.non_inferiority_p,
        "equivalence_p_value": margin.equivalence_p,
    }
    shown["bayesian"] = _bayesian(found, bare, place, sides, rises=rises, level=1 - trial.alpha)
    if options.bounds is not None:
        shown["group_sequential"] = _group_sequential(trial, found, sides, options)
    tenure = seen.tenures.get(metric.name)
    shown["novelty"] = novelty.novelty(tenure, place) if tenure is not None else None
    shown["time_to_decision"] = _time_left(seen, metric, chosen, sides, tuning)
    return shown


def _lift_json(found: Lift) -> Json:
    fixed, sequence = found.fixed, found.sequence
    known = math.isfinite(sequence.interval[0])
    return {
        "estimate": found.estimate,
        "std_error": found.std_error,
        "relative_lift": found.relative,
        "fixed_horizon": {
            "interval": fixed.interval,
            "relative_interval": fixed.relative_interval,
            "p_value": fixed.p_value,
            "method": fixed.method,
        },
        "always_valid": {
            "interval": sequence.interval if known else None,
            "relative_interval": sequence.relative_interval if known else None,
            "e_value": math.exp(min(700.0, sequence.log_e)) if known else None,
            "p_value": sequence.p_value if known else None,
            "method": sequence.method if known else "none before 100 units an arm and 10 that differ",
        },
    }


def decision(evidence: Evidence | None) -> Json | None:
    """The statement that the deciding path makes, as it makes it."""
    if evidence is None:
        return None
    names = {
        Evidence.FINDING_HARMFUL: "harmful",
        Evidence.FINDING_SAFE: "safe",
        Evidence.FINDING_BETTER: "better",
    }
    questions = {
        "harmful": evidence.log_e_harm,
        "safe": evidence.log_e_safe,
        "better": evidence.log_e_better,
    }
    return {
        "finding": names.get(evidence.finding, "undecided"),
        "estimate": evidence.estimate if evidence.units else None,
        "interval": (evidence.low, evidence.high) if evidence.units else None,
        "alpha": evidence.alpha,
        "threshold": 2 / evidence.alpha if evidence.alpha else None,
        **{
            question: {"e_value": math.exp(min(700.0, log_e)), "p_value": min(1.0, math.exp(-log_e))}
            for question, log_e in questions.items()
        },
        "units": evidence.units,
        "control_units": evidence.control_units,
        "method": evidence.method,
        "reason": evidence.reason,
    }


def _bayesian(
    found: Lift, cells: Cells, place: int, sides: Sequence[Measured], *, rises: bool, level: float
) -> Json | None:
    """Chance that the arm is better than the control, and what either choice costs on average if it is
    wrong."""
    if found.std_error <= 0:
        return None
    posterior = bayesian.posterior(lifts.as_effect(found, sides[0], sides[1]), level=level)
    chance = posterior.chance_to_win if rises else 1 - posterior.chance_to_win
    method = "normal posterior of the difference, flat prior"
    if found.binary:
        (s_c, n_c), (s_t, n_t) = (
            (float(cells.totals[cells.arms == arm].sum()), sides[side].units)
            for side, arm in enumerate((0, place))
        )
        risen = bayesian.beta_chance_to_win((s_c, n_c), (s_t, n_t))
        chance = risen if rises else 1 - risen
        method = "beta-binomial with Beta(1, 1) priors; interval and risks by its normal approximation"
    risks = (posterior.risk_control, posterior.risk_treatment)
    keep, take = risks if rises else (risks[1], risks[0])
    return {
        "chance_to_be_better": chance,
        "interval": posterior.ci,
        "risk_of_keeping_the_control": keep,
        "risk_of_taking_it": take,
        "method": method,
    }


def _group_sequential(trial: Trial, found: Lift, sides: Sequence[Measured], options: Options) -> Json:
    """Planned looks at even shares of the planned units, error spent as Lan and DeMets do."""
    name = options.bounds or "obrien_fleming"
    if not trial.planned_units:
        return {"bounds": name, "note": "Bounds for planned looks need planned_units."}
    fractions = [(look + 1) / options.looks for look in range(options.looks)]
    limits = group_sequential.bounds(fractions, alpha=trial.alpha, spending=_SPENDING[name])
    share = min(side.units for side in sides) / trial.planned_units
    passed = sum(share >= fraction - 1e-9 for fraction in fractions)
    z = found.estimate / found.std_error if found.std_error > 0 else 0.0
    return {
        "bounds": name,
        "looks": [
            {"information": fraction, "z_bound": limit}
            for fraction, limit in zip(fractions, limits, strict=True)
        ],
        "information": share,
        "look": passed,
        "z": z,
        "crossed": bool(passed) and abs(z) >= limits[passed - 1],
        "note": "Holds if it is read at the planned looks only, each when its share of units has come.",
    }


def _time_left(
    seen: Seen, metric: TrialMetric, cells: Cells, sides: Sequence[Measured], tuning: float
) -> Json:
    trial = seen.trial
    end = trial.stopped_at_us or seen.now_us
    days = max(0, end - trial.started_at_us) / _DAY_US
    slower = min(side.units for side in sides)
    a_day = slower / days if days > 0 else None
    whole = stratified_effect(cells)
    target = metric.margin * (abs(whole.control_mean) if whole and metric.margin_is_relative else 1.0)
    goal = target or (whole.estimate if whole else 0.0)
    needed = (
        lifts.units_to_exclude(goal, whole, alpha=trial.alpha, tuning=tuning) if whole is not None else None
    )
    per_arm = needed / 2 if needed is not None else None

    def left(wanted: float | None) -> float | None:
        return None if wanted is None or not a_day else max(0.0, wanted - slower) / a_day

    return {
        "units_per_arm_and_day": a_day,
        "planned_days_left": left(trial.planned_units or None),
        "always_valid_units_per_arm": per_arm,
        "always_valid_days_left": left(per_arm),
        "about": "the smallest effect of interest" if target else "a difference as large as the one seen",
    }


def larger_is_better(metric: TrialMetric) -> bool:
    """What is wanted of the metric."""
    return metric.direction != TrialMetric.DIRECTION_DECREASE
