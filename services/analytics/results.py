"""What an experiment or a rollout shows so far: every number, beside the verdict that decides. Pure.

The verdict is the deciding path's own (`verdicts`); nothing here decides. What is added are the statements
that people ask for: fixed-horizon tests beside always-valid ones, relative lifts, covariate adjustment beside
the plain estimate, non-inferiority and equivalence, posteriors, quantiles, corrections over metrics, planned
looks, and how long it will take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from headrace.v1.trials_pb2 import Trial, TrialMetric, Verdict

from services.analytics import lifts, novelty, words
from services.analytics.arm_results import Json, Options, Seen, compared, decision, larger_is_better
from services.analytics.caveats import assumptions, warnings
from services.analytics.evidence import metric_key
from services.analytics.lifts import Measured
from services.analytics.quantile_lifts import compared_quantiles
from services.analytics.shadow_evidence import SHADOW_METRICS
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.statistics import counts, multiple
from services.analytics.trial_queries import Counts
from services.analytics.trial_strata import BEFORE
from services.analytics.verdicts import nothing_observed

_SHARES = (0.5, 0.95, 0.99)


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
        "direction": "increase" if larger_is_better(metric) else "decrease",
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
        comparison["decision"] = decision(evidence.get(name))
        if cells is not None:
            comparison |= compared(seen, metric, cells, place, options)
        histograms = seen.observed.histograms.get(metric_key(metric)) if metric.quantile else seen.latencies
        if metric.name not in SHADOW_METRICS and (metric.quantile or metric.name == "latency_ms"):
            shares = (metric.quantile,) if metric.quantile else _SHARES
            comparison["quantiles"] = compared_quantiles(histograms or {}, place, shares, trial.alpha)
        shown["comparisons"].append(comparison)
    return shown


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
