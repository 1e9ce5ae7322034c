"""What an experiment or a rollout shows so far: every number, beside the verdict that decides. Pure.

The verdict is the deciding path's own (`verdicts`); nothing here decides. What is added are the statements
that people ask for: fixed-horizon tests beside always-valid ones, relative lifts, covariate adjustment beside
the plain estimate, non-inferiority and equivalence, posteriors, quantiles, corrections over metrics, planned
looks, and how long it will take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from headrace.v1.trials_pb2 import Evidence, Trial, TrialMetric, Verdict

from services.analytics import lifts, novelty, words
from services.analytics.caveats import assumptions, warnings
from services.analytics.evidence import Observed, metric_key
from services.analytics.lifts import Lift, Measured
from services.analytics.novelty import Tenure
from services.analytics.quantile_lifts import Histograms, compared_quantiles
from services.analytics.shadow_evidence import SHADOW_METRICS
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.statistics import bayesian, counts, group_sequential, multiple
from services.analytics.statistics.stratified import Cells, stratified_effect
from services.analytics.trial_queries import BEFORE, Counts
from services.analytics.verdicts import nothing_observed

Json = dict[str, Any]
Bounds = Literal["obrien_fleming", "pocock"]

_SPENDING = {
    "obrien_fleming": group_sequential.obrien_fleming_spending,
    "pocock": group_sequential.pocock_spending,
}
_SHARES = (0.5, 0.95, 0.99)
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


def not_started(trial: Trial, now_us: int) -> Seen:
    """What is seen of a trial before it begins: its plan."""
    none = [Counts(0, 0, 0, 0)] * len(trial.arms)
    verdict = Verdict(trial_id=trial.trial_id, trial_revision=trial.revision, model=trial.model)
    return Seen(trial, verdict, nothing_observed(trial, ShadowTotals()), none, now_us)


def results(seen: Seen, options: Options) -> Json:
    """The answer of GET /v1/experiments/{id}/results and /v1/rollouts/{id}/results."""
    trial = seen.trial
    metrics = [_metric(seen, metric, options) for metric in trial.metrics]
    _correct(metrics)
    tested = any("fixed_horizon" in one for metric in metrics for one in metric["comparisons"])
    said = warnings(trial, seen.observed, seen.counts, tested=tested)
    said += [
        novelty.warning(metric["metric"], one["arm"], one["novelty"])
        for metric in metrics
        for one in metric["comparisons"]
        if (one.get("novelty") or {}).get("changes")
    ]
    shown: Json = {
        "trial_id": trial.trial_id,
        "kind": "rollout" if trial.kind == Trial.KIND_ROLLOUT else "experiment",
        "name": trial.name,
        "model": trial.model,
        "status": _status(trial),
        "started_at": _instant(trial.started_at_us),
        "stopped_at": _instant(trial.stopped_at_us),
        "until": _instant(seen.verdict.until_us),
        "alpha": trial.alpha,
        "planned_units": trial.planned_units or None,
        "arms": [_arm(seen, place) for place in range(len(trial.arms))],
        "sample_ratio": _sample_ratio(seen),
        "metrics": metrics,
        "recommended_weights": [weight / 10_000 for weight in seen.verdict.weights] or None,
        "placebo": seen.placebo,
        "assumptions": assumptions(trial),
        "warnings": [*seen.verdict.warnings, *said],
    }
    shown["summary"] = words.paragraph(shown)
    plain: Json = _plain(shown)
    return plain


def _arm(seen: Seen, place: int) -> Json:
    arm, count = seen.trial.arms[place], seen.counts[place]
    share = _ratio(count.errors, count.requests)
    return {
        "name": arm.name,
        "version": arm.version,
        "control": place == 0,
        "weight": arm.weight / 10_000,
        "requests": count.requests,
        "units": count.units,
        "errors": count.errors,
        "error_rate": share,
        "requests_at_this_weight": count.requests_since,
    }


def _metric(seen: Seen, metric: TrialMetric, options: Options) -> Json:
    trial = seen.trial
    evidence = {one.arm: one for one in seen.verdict.evidence if one.metric == metric_key(metric)}
    shown: Json = {
        "metric": metric_key(metric),
        "role": "guardrail" if metric.role == TrialMetric.ROLE_GUARDRAIL else "success",
        "direction": "increase" if _rises(metric) else "decrease",
        "margin": metric.margin or None,
        "margin_is_relative": metric.margin_is_relative,
        "missing": "zero" if metric.missing_is_zero else "exclude",
        "covariate": "pre_period" if metric.covariate else None,
        "arms": [],
        "comparisons": [],
    }
    cells = seen.observed.cells.get(metric.name) if not metric.quantile else None
    if cells is not None:
        randomised = cells.where(cells.strata < BEFORE)
        shown["arms"] = [
            {
                "arm": arm.name,
                **_measured_json(lifts.measured(lifts.unadjusted(randomised), place, alpha=trial.alpha)),
            }
            for place, arm in enumerate(trial.arms)
        ]
    for place in range(1, len(trial.arms)):
        name = trial.arms[place].name
        comparison: Json = {"arm": name, "control": trial.arms[0].name}
        comparison["decision"] = _decision(evidence.get(name))
        if cells is not None:
            comparison |= _compared(seen, metric, cells, place, options)
        histograms = seen.observed.histograms.get(metric_key(metric)) if metric.quantile else seen.latencies
        if metric.name not in SHADOW_METRICS and (metric.quantile or metric.name == "latency_ms"):
            shares = (metric.quantile,) if metric.quantile else _SHARES
            comparison["quantiles"] = compared_quantiles(histograms or {}, place, shares, trial.alpha)
        shown["comparisons"].append(comparison)
    return shown


def _compared(seen: Seen, metric: TrialMetric, cells: Cells, place: int, options: Options) -> Json:
    """One arm against the control, on units that chance divided."""
    trial, rises = seen.trial, _rises(metric)
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


def _decision(evidence: Evidence | None) -> Json | None:
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


def _correct(metrics: Sequence[Json]) -> None:
    """Add to every comparison what its p-value is worth among those of the same role: success metrics by
    Benjamini and Hochberg (q), guardrails by Holm on non-inferiority."""
    for role, method, name in (("success", "bh", "q_value"), ("guardrail", "holm", "holm_p_value")):
        found = [
            (comparison, p_value)
            for metric in metrics
            if metric["role"] == role
            for comparison in metric["comparisons"]
            if (p_value := _raw(comparison, role)) is not None
        ]
        adjusted = multiple.adjust([p for _, p in found], "bh" if method == "bh" else "holm").p_values
        for (comparison, _), value in zip(found, adjusted.tolist(), strict=True):
            comparison[name] = value


def _raw(comparison: Json, role: str) -> float | None:
    if role == "success":
        p_value: float | None = comparison.get("fixed_horizon", {}).get("p_value")
        return p_value
    tests = comparison.get("margin_tests")
    return tests["non_inferiority_p_value"] if tests else None


def _sample_ratio(seen: Seen) -> Json:
    """Units of each arm against the weights under which they came: a fixed test, and the sequential one that
    the verdict uses."""
    strata, first = seen.observed.strata, seen.observed.visits.first
    usable = np.all(np.isfinite(strata.shares), axis=1)
    units, shares = first.units[usable], strata.shares[usable]
    log_e = seen.verdict.sample_ratio_log_e
    shown: Json = {
        "mismatch": seen.verdict.sample_ratio_mismatch,
        "sequential_e_value": math.exp(min(700.0, log_e)),
        "sequential_p_value": min(1.0, math.exp(-log_e)),
        "fixed_p_value": None,
        "units": units.sum(axis=0).tolist() if units.size else None,
        "expected": None,
    }
    if units.sum() > 0:
        expected = (shares / shares.sum(axis=1, keepdims=True) * units.sum(axis=1, keepdims=True)).sum(axis=0)
        shown["expected"] = expected.tolist()
        shown["fixed_p_value"] = counts.sample_ratio(units.sum(axis=0), expected).p_value
    return shown


def _measured_json(one: Measured) -> Json:
    return {
        "units": one.units,
        "observations": one.observations,
        "mean": one.mean if one.observations else None,
        "sd": one.sd if one.units > 1 else None,
        "interval": one.interval,
    }


def _status(trial: Trial) -> str:
    if trial.stopped_at_us:
        return "stopped"
    return "running" if trial.started_at_us else "not started"


def _instant(unix_us: int) -> str | None:
    """RFC 3339 in UTC; None for what has not been."""
    if not unix_us:
        return None
    return datetime.fromtimestamp(unix_us / 1e6, UTC).isoformat()


def _rises(metric: TrialMetric) -> bool:
    return metric.direction != TrialMetric.DIRECTION_DECREASE


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _plain(value: Any) -> Any:
    """The same for JSON, which knows no infinity: what has no limit is null."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    return value
