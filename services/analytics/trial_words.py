"""Verdicts in words with their numbers. Pure."""

from __future__ import annotations

import math

from headrace.v1.trials_pb2 import Evidence, Trial, TrialMetric, Verdict

_SHARES = {"error_rate", "accuracy", "shadow_disagreement", "shadow_error_rate"}


def is_share(metric: str) -> bool:
    """Whether values of the metric are shares, shown as percentages."""
    return metric in _SHARES


def reason(evidence: Evidence, metric: TrialMetric, control: str, kind: Trial.Kind) -> str:
    """One sentence: what was found, the numbers, and how sure it is. Arms of a rollout are versions."""
    if not evidence.units and not evidence.control_units:
        return f"Nothing has been measured of {evidence.metric} yet."
    sure = f"{1 - evidence.alpha:.2%}".rstrip("0").rstrip(".%") + "%"
    share = is_share(metric.name)
    called = "version " if kind == Trial.KIND_ROLLOUT else ""
    if metric.name == "shadow_disagreement":
        found = (
            f"{evidence.mean:.2%} of {evidence.units} requests were answered differently by {evidence.arm}"
        )
    else:
        found = (
            f"{evidence.metric} is {_value(evidence.mean, share)} of {called}{evidence.arm} "
            f"({evidence.units} units) against {_value(evidence.control_mean, share)} of {called}{control} "
            f"({evidence.control_units} units)"
        )
    bounds = _bounds(evidence, share)
    return f"{found}{bounds}: {_finding(evidence, metric, share)} (at every moment with {sure} confidence)."


def summary(trial: Trial, verdict: Verdict) -> str:
    """A paragraph: how much was seen, every reason, and what speaks against believing it."""
    seen = ", ".join(f"{arm.name} {arm.requests} requests of {arm.units} units" for arm in verdict.arms)
    order = (
        Evidence.FINDING_HARMFUL,
        Evidence.FINDING_BETTER,
        Evidence.FINDING_SAFE,
        Evidence.FINDING_UNDECIDED,
    )
    reasons = [one.reason for finding in order for one in verdict.evidence if one.finding == finding]
    return " ".join([f"Seen so far: {seen}.", *reasons, *verdict.warnings])


def _bounds(evidence: Evidence, share: bool) -> str:
    low, high = evidence.low, evidence.high
    if math.isinf(low) and math.isinf(high):
        return f", a difference of {_gap(evidence.estimate, share)}"
    limits = " and ".join(
        f"{word} {_gap(limit, share)}"
        for word, limit in (("at least", low), ("at most", high))
        if math.isfinite(limit)
    )
    return f", a difference of {_gap(evidence.estimate, share)}, {limits}"


def _finding(evidence: Evidence, metric: TrialMetric, share: bool) -> str:
    if metric.margin_is_relative:
        margin = f"{metric.margin:.3g} of the control's value"
    else:
        margin = _gap(metric.margin, share).lstrip("+")
    return {
        Evidence.FINDING_HARMFUL: f"worse by more than {margin}",
        Evidence.FINDING_SAFE: f"not worse by {margin} or more",
        Evidence.FINDING_BETTER: "better",
    }.get(evidence.finding, "nothing is proven yet")


def _value(value: float, share: bool) -> str:
    return f"{value:.2%}" if share else f"{value:.4g}"


def _gap(value: float, share: bool) -> str:
    return f"{value * 100:+.2f} points" if share else f"{value:+.4g}"
